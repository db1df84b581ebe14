"""Who attends to the prompts, and where in the image the class token looks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from ..adapter import PromptedAdapter
from ..utils.attention_weights import attention_weights
from .figure import new_figure, number_axis

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_attention_to_prompts(model: nn.Module, inputs: Mapping[str, Any]) -> Figure:
    """The share of attention that goes to visual and to key-value prompts, by layer and head.

    One row of maps for the class token (and what else stands in front of the patches), one for the patches; each is
    the mean over them and over the images, of the attention weights summed over the prompts.

    Args:
        model (`nn.Module`): The adapted model, with one active adapter.
        inputs (`Mapping`): What it is called with, for example `{"pixel_values": images}`.

    Returns:
        `matplotlib.figure.Figure`: It belongs to no window: `savefig` it, or show it in a notebook.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: The model has no active E2VPT adapter, several, or returns no attention weights of prompts.

    Example:

        ```py
        >>> plot_attention_to_prompts(model, {"pixel_values": images}).savefig("attention.png")
        ```
    """
    maps = _attention_maps(model, inputs)
    kinds = [kind for kind in ("visual", "key-value") if any(m.to_prompts[kind].numel() for m in maps)]
    sources = [("class token", True), ("patches", False)] if maps[0].special else [("patches", False)]
    figure = new_figure(1.2 + 2.6 * len(kinds), 0.8 + (0.6 + 0.24 * len(maps)) * len(sources))
    grid = figure.subplots(len(sources), len(kinds), sharex=True, sharey=True, squeeze=False)
    for column, kind in enumerate(kinds):
        shares = [torch.stack([m.share(kind, special) for m in maps]) for _, special in sources]
        most = max(float(share.max()) for share in shares)  # one scale, so that the two can be compared
        for axes, share, (source, _) in zip(grid[:, column], shares, sources):
            image = axes.imshow(share.numpy(), cmap="viridis", vmin=0, vmax=most, aspect="auto")
            axes.set_title(f"from {source}\nto {kind} prompts", fontsize="medium")
            number_axis(axes.xaxis, share.shape[1])
            number_axis(axes.yaxis, share.shape[0])
        bar = figure.colorbar(image, ax=list(grid[:, column]), aspect=30, label="share of the attention")
        bar.ax.yaxis.set_major_formatter("{x:.3g}")
        grid[-1, column].set_xlabel("head")
    for row in grid:
        row[0].set_ylabel("layer")
    return figure


def plot_attention_on_image(model: nn.Module, inputs: Mapping[str, Any], layer: int = -1) -> Figure:
    """Where in each image the class token looks, head by head, and how much of its attention goes to prompts.

    Models without a class token: the mean over the patches that look.

    Args:
        model (`nn.Module`): The adapted model, with one active adapter.
        inputs (`Mapping`): What it is called with: `pixel_values` and what else the model needs, a few images.
        layer (`int`): Which layer, counted from 0; from the end if negative.

    Returns:
        `matplotlib.figure.Figure`: A row for each image; the mean over heads comes first.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError:
            The model has no active E2VPT adapter, several, returns no attention weights of prompts, or patches in no
            known grid.

    Example:

        ```py
        >>> plot_attention_on_image(model, {"pixel_values": images[:3]}, layer=5).savefig("where.png")
        ```
    """
    images = inputs["pixel_values"].detach().float().cpu()
    maps = _attention_maps(model, inputs)[layer]
    ratio = images.shape[-2] / images.shape[-1]
    looking = maps.patches[:, :, : maps.special or None].mean(2)  # (images, heads, patches)
    height = round((looking.shape[-1] * ratio) ** 0.5)
    width = looking.shape[-1] // height
    if height * width != looking.shape[-1]:
        raise ValueError(f"{looking.shape[-1]} patches make no grid of the shape {tuple(images.shape[-2:])}.")
    looking = looking.unflatten(-1, (height, width))
    looking = torch.cat([looking.mean(1, keepdim=True), looking], 1)
    prompts = torch.cat(list(maps.to_prompts.values()), -1)
    to_prompts = prompts.sum(-1)[:, :, : maps.special or None].mean(2)
    to_prompts = torch.cat([to_prompts.mean(1, keepdim=True), to_prompts], 1)

    columns = looking.shape[1] + 1
    figure = new_figure(1.25 * columns, 1.35 * len(images) * ratio + 0.3 + 0.15 * len(images))
    grid = figure.subplots(len(images), columns, squeeze=False)
    for number, row in enumerate(grid):
        low, high = images[number].min(), images[number].max()
        picture = ((images[number] - low) / (high - low).clamp(min=1e-6)).permute(1, 2, 0).numpy()
        row[0].imshow(picture)
        for column, axes in enumerate(row[1:]):
            seen = looking[number, column]
            axes.imshow(picture.mean(-1), cmap="gray", vmax=1.5)  # dimmed, so that the colour stands out
            extent = (-0.5, picture.shape[1] - 0.5, picture.shape[0] - 0.5, -0.5)
            strength = (seen / seen.max()).numpy()
            axes.imshow(strength, cmap="autumn", alpha=0.85 * strength, vmin=0, vmax=1, extent=extent)
            axes.set_xlabel(f"prompts {to_prompts[number, column]:.0%}", fontsize="small")
    for axes, title in zip(grid[0], ["image", "mean", *(f"head {head}" for head in range(columns - 2))]):
        axes.set_title(title, fontsize="medium")
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
    return figure


class _Maps(NamedTuple):
    """The attention weights of one layer, by what is attended to.

    Attributes:
        to_prompts (`dict[str, torch.Tensor]`):
            By the kind of prompts, (images, heads, tokens of the image, prompts). The tokens are the special ones,
            the patches, and those behind them.
        patches (`torch.Tensor`): (images, heads, tokens of the image, patches).
        special (`int`): The number of special tokens.
    """

    to_prompts: dict[str, torch.Tensor]
    patches: torch.Tensor
    special: int

    def share(self, kind: str, is_special: bool) -> torch.Tensor:
        """The mean share that each head pays to prompts, by the special tokens or by the patches, (heads,)."""
        rows = slice(None, self.special) if is_special else slice(self.special, self.special + self.patches.shape[-1])
        return self.to_prompts[kind][:, :, rows].sum(-1).mean((0, 2))


def _attention_maps(model: nn.Module, inputs: Mapping[str, Any]) -> list[_Maps]:
    adapter = PromptedAdapter.find(model)
    config, base = adapter.config, adapter.backbone
    in_softmax = config.num_kv_prompts > config.num_kv_prompts_beside
    if not (config.num_visual_prompts or in_softmax):
        raise ValueError(
            f"Adapter '{adapter.name}' has kv_prompt_activation={config.kv_prompt_activation!r} and no other prompts: "
            "the attention, which they are beside, pays them nothing that could be plotted."
        )
    if not isinstance(base, PreTrainedModel):
        raise ValueError(
            f"{type(base).__name__} is no model of transformers, which could be asked for its attention weights: "
            "there is nothing to plot."
        )
    weights = attention_weights(model, base, inputs)
    # Where attention is written out, they are returned without the columns of the prefix.
    has_prefix = in_softmax or (config.num_visual_prompts > 0 and not adapter.is_shallow)
    if not weights or (has_prefix and all(layer.shape[-1] == layer.shape[-2] for layer in weights)):
        raise ValueError(f"{type(base).__name__} returns no attention weights of prompts: there is nothing to plot.")
    # Layers further on may have more tokens, queries of a mask head for example: they are in front, too.
    length = weights[0].shape[-2]
    return [
        _split(layer_weights.float().cpu(), adapter, layer_weights.shape[-2] - length) for layer_weights in weights
    ]


def _split(weights: torch.Tensor, adapter: PromptedAdapter, more_special: int) -> _Maps:
    """Attention maps begin with the prefix; shallow prompts are tokens behind the special ones."""
    site, kept = adapter.layers[0].site, adapter.masks.num_tokens
    prefix, special = weights.shape[-1] - weights.shape[-2], site.num_special_tokens + more_special
    if adapter.is_shallow:
        weights = torch.cat([weights[:, :, :special], weights[:, :, special + kept :]], 2)
        deep, inserted = 0, kept
    else:
        deep, inserted = kept if prefix else 0, 0
    patches = weights.shape[-1] - prefix - special - inserted - site.num_tokens_behind
    visual, key_value, _, shallow, to_patches, _ = weights.split(
        [deep, prefix - deep, special, inserted, patches, site.num_tokens_behind], -1
    )
    visual = shallow if adapter.is_shallow else visual
    return _Maps({"visual": visual, "key-value": key_value}, to_patches, special)
