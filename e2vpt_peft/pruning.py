"""Prompt pruning and rewinding (section 3.3 of the paper), by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Optional, Union

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from .config import E2VPTConfig
from .importance import PromptScores, prompted_layers
from .layer import E2VPTLayer
from .masks import segment_mask as current_segment_mask
from .masks import token_mask as current_token_mask

MINIMUM_TOKENS = 1
MINIMUM_SEGMENT_SHARE = 1 / 4
"""At least 1 visual prompt and 4 of 16 segments stay unless told otherwise, as in the published code."""

Mask = Union[torch.Tensor, Sequence[bool], Sequence[Sequence[bool]]]


@dataclass(frozen=True)
class PruningSummary:
    """What a pruning left.

    Attributes:
        adapter_name (`str`): The adapter.
        tokens_before, tokens_after (`int`): Its visual prompts, per layer when deep.
        segments_before, segments_after (`int`): Their segments, together.
        parameters_before, parameters_after (`int`): Its parameters, without `modules_to_save`.
    """

    adapter_name: str
    tokens_before: int
    tokens_after: int
    segments_before: int
    segments_after: int
    parameters_before: int
    parameters_after: int

    def __str__(self) -> str:
        lines = [f"Pruned adapter '{self.adapter_name}':"]
        for label in ("tokens", "segments", "parameters"):
            before, after = getattr(self, f"{label}_before"), getattr(self, f"{label}_after")
            name = "visual prompts" if label == "tokens" else label
            lines.append(f"  {name:<15}{before:>10,} -> {after:>10,}  ({after / before:.1%} left)")
        return "\n".join(lines)


def prune_prompts(
    model: nn.Module,
    scores: Optional[PromptScores] = None,
    token_rate: Optional[float] = None,
    segment_rate: Optional[float] = None,
    *,
    token_count: Optional[int] = None,
    segment_count: Optional[int] = None,
    token_mask: Optional[Mask] = None,
    segment_mask: Optional[Mask] = None,
    min_tokens: int = MINIMUM_TOKENS,
    min_segments: Optional[int] = None,
    adapter_name: Optional[str] = None,
) -> PruningSummary:
    """Remove the visual prompts, and the segments of those left, that have the lowest scores.

    Pruned visual prompts are gone, from the parameters, the attention and the file. Pruned segments are zero and no
    parameters, so that no optimiser, weight decay or resumed training can bring them back. Other adapters are not
    touched. Parameters are new tensors afterwards: make optimisers after pruning.

    Args:
        model (`nn.Module`): The adapted model.
        scores ([`PromptScores`]): What [`score_prompts`] returned; not needed with masks.
        token_rate, segment_rate (`float`):
            The share of visual prompts, and of the segments of each that is left, to remove, rounded down.
        token_count, segment_count (`int`): The number of them, in place of the share.
        token_mask, segment_mask:
            Which to keep, in place of scores: (visual prompts,) and (visual prompts, segments), of the visual prompts
            that there are now.
        min_tokens, min_segments (`int`):
            How many visual prompts, and segments of each, stay in any case. Defaults to 1, and a quarter of them.
        adapter_name (`str`, *optional*): The adapter; the active one by default.

    Returns:
        [`PruningSummary`]: What is left; `print` it.

    Raises:
        ValueError: Arguments are missing, contradict each other, or do not fit the adapter. Nothing is changed.

    Example:

        ```py
        >>> scores = score_prompts(model, dataloader)
        >>> print(prune_prompts(model, scores, token_rate=0.3, segment_rate=0.5))
        >>> rewind_prompts(model)
        ```
    """
    name, layers = prompted_layers(model, adapter_name)
    config = layers[0].adapter_configs[name]
    tokens, segments = current_token_mask(config), current_segment_mask(config)
    kept = int(tokens.sum())
    if min_segments is None:
        min_segments = math.ceil(config.num_segments * MINIMUM_SEGMENT_SHARE)
    if scores is not None and tuple(scores.segments.shape) != (kept, config.num_segments):
        raise ValueError(
            f"scores are for {scores.segments.shape[0]} visual prompts of {scores.segments.shape[1]} segments, but "
            f"adapter '{name}' has {kept} of {config.num_segments}: score it again."
        )
    token_scores = None if scores is None else scores.tokens
    new_tokens = _choose(
        "token", torch.ones(kept, dtype=torch.bool), token_scores, token_rate, token_count, token_mask, min_tokens
    )
    segment_scores = None if scores is None else scores.segments
    new_segments = _choose(
        "segment", segments[tokens], segment_scores, segment_rate, segment_count, segment_mask, min_segments
    )
    before = _counts(layers, name)
    tokens[tokens.clone()] = new_tokens
    segments[current_token_mask(config)] = new_segments
    set_masks(model, tokens, segments, name)
    return PruningSummary(name, *(count for pair in zip(before, _counts(layers, name)) for count in pair))


def rewind_prompts(
    model: nn.Module,
    *,
    init: Literal["saved", "fresh"] = "saved",
    undo_pruning: bool = False,
    adapter_name: Optional[str] = None,
) -> None:
    """Put what is left of an adapter, and the `modules_to_save` trained with it, back to the start, to train again.

    The initial values of prompts are kept on the [`E2VPTLayer`]s when an adapter is made, in the memory of the CPU
    (one more copy of the prompts, a few hundred kilobytes). They are in no file that `save_pretrained` writes, so
    that an adapter that was loaded has none. Modules of `modules_to_save` go back to the values of the backbone's own
    module, of which they are a copy.

    Args:
        model (`nn.Module`): The adapted model.
        init (`"saved"` or `"fresh"`):
            `"saved"` puts the initial values back (lottery-ticket rewinding), `"fresh"` draws new ones, as the
            published code does. Fresh values are the initial values from then on.
        undo_pruning (`bool`): Also bring back the prompts and segments that were pruned.
        adapter_name (`str`, *optional*): The adapter; the active one by default.

    Raises:
        ValueError: `init="saved"`, but the adapter was loaded from a file. Nothing is changed.
    """
    name, layers = prompted_layers(model, adapter_name)
    if init not in ("saved", "fresh"):
        raise ValueError(f"init={init!r} must be 'saved' or 'fresh'.")
    if init == "saved" and not all(name in layer.initial_prompts for layer in layers):
        raise ValueError(
            f"The initial values of adapter '{name}' are not known, because it was loaded from a file. Use "
            "rewind_prompts(model, init='fresh') to start from new ones."
        )
    config = layers[0].adapter_configs[name]
    if undo_pruning:
        config.token_mask = config.segment_mask = None
    for layer in layers:
        if init == "fresh":
            layer.draw_initial_prompts(name)
        layer.rewind(name)
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and name in module.modules_to_save:
            module.modules_to_save[name].load_state_dict(module.original_module.state_dict())


def set_masks(model: nn.Module, tokens: torch.Tensor, segments: torch.Tensor, adapter_name: str) -> None:
    """Give an adapter the masks of its config anew, and keep the values of the prompts.

    Args:
        model (`nn.Module`): The adapted model.
        tokens, segments (`torch.Tensor`):
            Which to keep, bool, (visual prompts,) and (visual prompts, segments), of those that it had when made.
        adapter_name (`str`): The adapter.
    """
    _, layers = prompted_layers(model, adapter_name)
    dense = [layer.visual_prompts(adapter_name) for layer in layers]
    config = layers[0].adapter_configs[adapter_name]
    config.token_mask = None if tokens.all() else tokens.tolist()
    config.segment_mask = None if segments[tokens].all() else (segments & tokens[:, None]).tolist()
    for layer, prompts in zip(layers, dense):
        if prompts is not None:
            layer.set_visual_prompts(adapter_name, prompts)


def _choose(
    what: str,
    present: torch.Tensor,
    scores: Optional[torch.Tensor],
    rate: Optional[float],
    count: Optional[int],
    mask: Optional[Mask],
    minimum: int,
) -> torch.Tensor:
    """Which of the `present` to keep, a bool tensor of their shape; ranks are within the last dimension."""
    given = [name for name, value in (("rate", rate), ("count", count), ("mask", mask)) if value is not None]
    names = [f"{what}_{name}" for name in given]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(names)} contradict each other: give one of them.")
    if not given:
        return present
    if mask is not None:
        keep = torch.as_tensor(mask)
        if keep.dtype != torch.bool or keep.shape != present.shape:
            raise ValueError(
                f"{names[0]} must be boolean, of shape {tuple(present.shape)}; it is {keep.dtype}, "
                f"{tuple(keep.shape)}."
            )
        keep = keep.cpu() & present
        if not keep.flatten().any():
            raise ValueError(f"{names[0]} keeps nothing: at least one {what} must stay.")
        return keep
    if scores is None:
        raise ValueError(f"{names[0]} needs scores: call score_prompts first, or give {what}_mask.")
    if rate is not None and not 0 <= rate <= 1:
        raise ValueError(f"{names[0]}={rate!r} must be in [0, 1].")
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 0):
        raise ValueError(f"{names[0]}={count!r} must be an integer, 0 or more.")
    return select(scores, present, minimum, rate=rate, count=count)


def select(
    scores: torch.Tensor,
    present: torch.Tensor,
    minimum: int,
    *,
    rate: Optional[float] = None,
    count: Optional[int] = None,
) -> torch.Tensor:
    """Keep those with the highest scores in each row; ties are pruned from the lower index on.

    Args:
        scores (`torch.Tensor`): Of shape (..., candidates).
        present (`torch.Tensor`): Which of the candidates there are, bool, of the same shape.
        minimum (`int`): How many stay in each row, if there are so many.
        rate, count: The share of those present, rounded down, or the number, to prune in each row.

    Returns:
        `torch.Tensor`: Which to keep, bool, of the same shape.
    """
    # Absent ones come first in the order and are never kept; a stable sort leaves ties in the order of their indices.
    order = scores.double().cpu().masked_fill(~present, -math.inf).argsort(dim=-1, stable=True)
    available = present.sum(-1, keepdim=True)
    wanted = (
        torch.floor(available * rate + 1e-9).long() if rate is not None else torch.full_like(available, count or 0)
    )
    pruned = torch.minimum(wanted, (available - minimum).clamp(min=0))
    rank = order.argsort(dim=-1)
    return present & (rank >= present.shape[-1] - available + pruned)


def _counts(layers: list[E2VPTLayer], adapter_name: str) -> tuple[int, int, int]:
    config: E2VPTConfig = layers[0].adapter_configs[adapter_name]
    parameters = [
        prompts[adapter_name].numel()
        for layer in layers
        for prompts in (layer.e2vpt_visual_prompts, layer.e2vpt_kv_prompts)
        if adapter_name in prompts
    ]
    return int(current_token_mask(config).sum()), int(current_segment_mask(config).sum()), sum(parameters)
