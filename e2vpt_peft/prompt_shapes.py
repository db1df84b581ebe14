"""The tensors of prompts: what they are called, and of which shapes they are. The one place that knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from .masks import MaskedConfig, PromptMasks

PREFIX = "e2vpt_"
"""What the names of prompts begin with, behind the name of their layer."""
VISUAL_PROMPTS, KV_PROMPTS = "e2vpt_visual_prompts", "e2vpt_kv_prompts"
SEGMENT_MASK = "e2vpt_segment_mask"
"""Beside flat visual prompts: which segments they have. Two masks that keep equally many could not be told apart."""


class PromptConfig(MaskedConfig, Protocol):
    """The fields of an [`~e2vpt_peft.E2VPTConfig`] that say how many prompts there are."""

    num_kv_prompts: int
    share_kv_prompts: bool

    @property
    def kv_prompt_activation(self) -> str | None: ...


class Sizes(Protocol):
    """The sizes of one self-attention."""

    @property
    def hidden_size(self) -> int: ...

    @property
    def num_heads(self) -> int: ...

    @property
    def head_size(self) -> int: ...


class AttentionSizes(NamedTuple):
    """The sizes of one self-attention, as numbers; 0 for one that is not known."""

    hidden_size: int = 0
    num_heads: int = 0
    head_size: int = 0


def prompt_shapes(
    config: PromptConfig, sizes: Sizes, masks: PromptMasks | None = None, has_visual_prompts: bool = True
) -> dict[str, tuple[int, ...]]:
    """The shapes of an adapter's tensors in one layer, by their names.

    Args:
        config ([`E2VPTConfig`]): The adapter's configuration.
        sizes (`Sizes`): Those of the attention. A size of 0 that is not known gives a 0 in the shapes.
        masks ([`PromptMasks`], *optional*): What is kept. Everything by default, whatever masks the config has.
        has_visual_prompts (`bool`): Whether visual prompts, if there are any, are in this layer.

    Returns:
        `dict[str, tuple[int, ...]]`:
            Visual prompts are (prompts, hidden size), or flat if a segment is pruned. Key-value prompts are (heads,
            prompts, head size), with a dimension of 2 in front if keys and values have prompts of their own, and one
            of 1 behind that if they have an activation. Where PEFT loads over an adapter it reads no configuration,
            so that shapes have to tell what a tensor is.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    if config.num_visual_prompts and has_visual_prompts:
        shapes[VISUAL_PROMPTS] = (config.num_visual_prompts, sizes.hidden_size)
        if masks is not None:
            is_flat = masks.has_pruned_segments
            flat, dense = (masks.num_parameters(sizes.hidden_size),), (masks.num_tokens, sizes.hidden_size)
            shapes[VISUAL_PROMPTS] = flat if is_flat else dense
    if config.num_kv_prompts:
        rows: tuple[int, ...] = (sizes.num_heads, config.num_kv_prompts, sizes.head_size)
        rows = (1, *rows) if config.kv_prompt_activation else rows
        shapes[KV_PROMPTS] = rows if config.share_kv_prompts else (2, *rows)
    return shapes


def saved_shapes(
    config: PromptConfig, sizes: Sizes, masks: PromptMasks, has_visual_prompts: bool = True
) -> dict[str, tuple[int, ...]]:
    """The shapes of all that an adapter saves of one layer: [`prompt_shapes`], and a mask beside flat prompts.

    Args:
        config, sizes, masks, has_visual_prompts: As for [`prompt_shapes`].
    """
    shapes = prompt_shapes(config, sizes, masks, has_visual_prompts)
    if len(shapes.get(VISUAL_PROMPTS, ())) == 1:
        shapes[SEGMENT_MASK] = tuple(masks.segments.shape)
    return shapes


def sizes_in(name: str, shape: Sequence[int]) -> dict[str, int]:
    """What the shape of a prompt tensor says of the attention that it was made for; nothing if it is flat.

    Args:
        name (`str`): The name of the tensor, without that of its layer.
        shape (`Sequence[int]`): Its shape.
    """
    if name == VISUAL_PROMPTS and len(shape) == 2:
        return {"hidden_size": shape[-1]}
    if name == KV_PROMPTS and len(shape) in (3, 4, 5):
        return {"num_heads": shape[-3], "head_size": shape[-1]}
    return {}
