"""Prompt pruning by hand (section 3.3 of the paper)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..adapter import PromptedAdapter
from ..masks import PromptMasks, select
from ..utils.fields import check_integer
from .scores import PromptScores, find_prunable

MINIMUM_TOKENS = 1
MINIMUM_SEGMENT_SHARE = 1 / 4
"""At least 1 visual prompt and 4 of 16 segments stay unless told otherwise, as in the published code."""

Mask = torch.Tensor | Sequence[bool] | Sequence[Sequence[bool]]


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

    @classmethod
    def of(cls, adapter: PromptedAdapter, masks: PromptMasks) -> PruningSummary:
        """What an adapter has now, and what it would have with other masks."""
        return cls(
            adapter.name,
            adapter.masks.num_tokens,
            masks.num_tokens,
            adapter.masks.num_segments,
            masks.num_segments,
            adapter.num_parameters(),
            adapter.num_parameters(masks),
        )

    def __str__(self) -> str:
        lines = [f"Pruned adapter '{self.adapter_name}':"]
        for label in ("tokens", "segments", "parameters"):
            before, after = getattr(self, f"{label}_before"), getattr(self, f"{label}_after")
            name = "visual prompts" if label == "tokens" else label
            lines.append(f"  {name:<15}{before:>10,} -> {after:>10,}  ({after / before:.1%} left)")
        return "\n".join(lines)


def prune_prompts(
    model: nn.Module,
    scores: PromptScores | None = None,
    token_rate: float | None = None,
    segment_rate: float | None = None,
    *,
    token_count: int | None = None,
    segment_count: int | None = None,
    token_mask: Mask | None = None,
    segment_mask: Mask | None = None,
    min_tokens: int = MINIMUM_TOKENS,
    min_segments: int | None = None,
    adapter_name: str | None = None,
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
            How many visual prompts, and segments of each, stay in any case, 1 or more. Defaults to 1, and a quarter of
            them.
        adapter_name (`str`, *optional*): The adapter; the active one by default.

    Returns:
        [`PruningSummary`]: What is left; `print` it.

    Raises:
        ValueError:
            Arguments are missing, contradict each other, or do not fit the adapter, scores are NaN, or nothing would
            be left. Nothing is changed.
        TypeError: An argument has the wrong type. Nothing is changed.

    Example:

        ```py
        >>> scores = score_prompts(model, dataloader)
        >>> print(prune_prompts(model, scores, token_rate=0.3, segment_rate=0.5))
        >>> rewind_prompts(model)
        ```
    """
    adapter = find_prunable(model, adapter_name)
    masks, num_segments = adapter.masks, adapter.config.num_segments
    if scores is not None:
        masks.check_scores(scores)
    min_segments = least_segments(num_segments) if min_segments is None else min_segments
    check_integer("min_tokens", min_tokens, at_least=1)
    check_integer("min_segments", min_segments, at_least=1)
    present = torch.ones(masks.num_tokens, dtype=torch.bool)
    token_scores, segment_scores = (None, None) if scores is None else (scores.tokens, scores.segments)
    tokens = _choose("token", present, token_scores, token_rate, token_count, token_mask, min_tokens)
    segments = _choose(
        "segment", masks.kept_segments, segment_scores, segment_rate, segment_count, segment_mask, min_segments
    )
    pruned = masks.keep(tokens, segments)
    summary = PruningSummary.of(adapter, pruned)
    adapter.set_masks(pruned)
    return summary


def least_segments(num_segments: int) -> int:
    """How many segments of each visual prompt stay unless told otherwise."""
    return math.ceil(num_segments * MINIMUM_SEGMENT_SHARE)


def _choose(
    what: str,
    present: torch.Tensor,
    scores: torch.Tensor | None,
    rate: float | None,
    count: int | None,
    mask: Mask | None,
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
