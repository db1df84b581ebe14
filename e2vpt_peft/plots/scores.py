"""How much each visual prompt, and each segment of it, is missed, layer by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from ..adapter import PromptedAdapter
from ..pruning import PromptScores
from .figure import new_figure, number_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_importance(model: nn.Module, scores: PromptScores, adapter_name: str | None = None) -> Figure:
    """Scores of tokens and of segments by layer, and below them, in black, those that are pruned.

    Make the scores before pruning and the picture after it, to see what went; or score a pruned adapter, whose pruned
    prompts then have no colour.

    Args:
        model (`nn.Module`): The adapted model. Its adapter says what is pruned.
        scores ([`PromptScores`]):
            Of [`score_prompts_by_layer`], or of [`score_prompts`], which has one row for all layers.
        adapter_name (`str`, *optional*): The adapter; the active one by default.

    Returns:
        `matplotlib.figure.Figure`: It belongs to no window: `savefig` it, or show it in a notebook.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: The scores are of another number of prompts or segments.

    Example:

        ```py
        >>> scores = score_prompts_by_layer(model, dataloader)
        >>> prune_prompts(model, score_prompts(model, dataloader), token_rate=0.3, segment_rate=0.5)
        >>> plot_importance(model, scores).savefig("importance.png")
        ```
    """
    adapter = PromptedAdapter.find(model, adapter_name)
    adapter.require_visual_prompts()
    config, masks = adapter.config, adapter.masks
    kept_tokens, kept_segments = masks.tokens, masks.segments
    tokens = scores.tokens.reshape(-1, scores.tokens.shape[-1])
    segments = scores.segments.reshape(-1, *scores.segments.shape[-2:])
    count = len(kept_tokens)
    if segments.shape[-1] != config.num_segments or segments.shape[1] not in (count, masks.num_tokens):
        raise ValueError(
            f"scores are for {segments.shape[1]} visual prompts of {segments.shape[2]} segments, but adapter "
            f"'{adapter.name}' has {count} of {config.num_segments}, {masks.num_tokens} of them not pruned: score it "
            "again."
        )
    if segments.shape[1] != count:  # made after pruning
        tokens = _at(tokens, kept_tokens, 1)
        segments = _at(segments, kept_tokens, 1)

    depth = len(tokens)
    figure = new_figure(min(1.6 + 0.09 * count * config.num_segments, 7), 3 + 0.5 * depth)
    heights = [max(depth, 3), 0.8, max(depth, 3), 0.8]
    tokens_map, tokens_strip, segments_map, segments_strip = figure.subplots(4, 1, height_ratios=heights)
    _heat_map(tokens_map, tokens)
    _heat_map(segments_map, segments.flatten(1))
    _strip(tokens_strip, kept_tokens)
    _strip(segments_strip, kept_segments.flatten())
    tokens_map.set_title("tokens")
    segments_map.set_title(f"segments, {config.num_segments} of each token")
    number_axis(tokens_strip.xaxis, count)
    borders = np.arange(count + 1) * config.num_segments - 0.5
    segments_strip.set_xticks(borders[:-1] + config.num_segments / 2, range(count))
    for axes in (segments_map, segments_strip):
        for border in borders[1:-1]:
            axes.axvline(border, color="black", linewidth=0.6)
    for axes in (tokens_map, segments_map):
        axes.set_xticks([])
        if depth > 1:
            axes.set_ylabel("layer")
            number_axis(axes.yaxis, depth)
        else:
            axes.set_yticks([])
    return figure


def _at(scores: torch.Tensor, kept: torch.Tensor, dim: int) -> torch.Tensor:
    """The scores at the places of the prompts that are kept, with nothing in between."""
    shape = [*scores.shape]
    shape[dim] = len(kept)
    return scores.new_full(shape, float("nan")).index_copy(dim, kept.nonzero()[:, 0], scores)


def _heat_map(axes: Axes, scores: torch.Tensor) -> None:
    """Red for what is missed, blue for what is not; the colours end at the largest score, of either sign."""
    limit = float(scores[scores.isfinite()].abs().max()) or 1.0
    image = axes.imshow(scores.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    axes.set_facecolor("0.9")
    figure = axes.get_figure()
    assert figure is not None
    figure.colorbar(image, ax=axes, label="rise of the loss\nwithout it", pad=0.02)


def _strip(axes: Axes, kept: torch.Tensor) -> None:
    """What is pruned, in black: the same in all layers."""
    axes.imshow(kept[None].numpy(), cmap="gray", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.set_yticks([0], ["pruned"])
    axes.tick_params(left=False)
    axes.set_xlabel("visual prompt")
