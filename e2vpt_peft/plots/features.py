"""Features in two dimensions, before and after adapting (the paper's figure of t-SNE)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from ..utils.fields import check_choice
from .figure import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_features(
    features: Mapping[str, Any],
    labels: Any,
    method: Literal["pca", "tsne"] = "pca",
    label_names: Sequence[str] | None = None,
    seed: int = 0,
) -> Figure:
    """Features of the same samples from several models, each projected to two dimensions, coloured by class.

    Args:
        features (`Mapping`): The features, (samples, size), by the title that they get, for example `"frozen"` and
            `"E²VPT"`: what the head sees, such as the class token of the last hidden states.
        labels: The classes of the samples, (samples,), from 0.
        method (`"pca"` or `"tsne"`):
            `"pca"` (default) keeps distances as well as a plane can. `"tsne"`, as in the paper, keeps neighbours:
            sizes of and distances between its clusters mean nothing.
        label_names (`Sequence[str]`, *optional*): Names of the classes for the legend.
        seed (`int`): Where t-SNE starts.

    Returns:
        `matplotlib.figure.Figure`: One panel for each model, with the share of variance or the method below.

    Raises:
        ImportError: matplotlib, or scikit-learn, is not installed.
        ValueError: The method is unknown, or the features are not of as many samples as the labels.

    Example:

        ```py
        >>> with model.disable_adapter():
        ...     frozen = model(pixel_values=images, output_hidden_states=True).hidden_states[-1][:, 0]
        >>> adapted = model(pixel_values=images, output_hidden_states=True).hidden_states[-1][:, 0]
        >>> plot_features({"frozen": frozen, "E²VPT": adapted}, labels, method="tsne")
        ```
    """
    check_choice("method", method, ("pca", "tsne"))
    classes = torch.as_tensor(labels).cpu().numpy()
    arrays = {title: torch.as_tensor(values).detach().cpu().double().numpy() for title, values in features.items()}
    for title, values in arrays.items():
        if values.ndim != 2 or len(values) != len(classes):
            raise ValueError(
                f"features[{title!r}] must be of shape ({len(classes)}, size), one row for each label, but is "
                f"{values.shape}."
            )
    figure = new_figure(3.4 * len(arrays) + 1, 3.4)
    panels = figure.subplots(1, len(arrays), squeeze=False)[0]
    present = np.unique(classes)
    colours = _colours(len(present))
    for axes, (title, values) in zip(panels, arrays.items()):
        points, axis_labels = _project(values, method, seed)
        for number, label in enumerate(present):
            chosen = points[classes == label]
            name = str(label) if label_names is None else label_names[int(label)]
            axes.plot(*chosen.T, "o", markersize=3, alpha=0.75, color=colours(number), markeredgewidth=0, label=name)
        axes.set_title(title)
        axes.set_xlabel(axis_labels[0])
        axes.set_ylabel(axis_labels[1])
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_box_aspect(1)
    if len(present) <= 20:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", markerscale=2, frameon=False)
    return figure


def _project(values: np.ndarray, method: str, seed: int) -> tuple[np.ndarray, tuple[str, str]]:
    try:
        from sklearn.decomposition import PCA
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise ImportError("plot_features needs scikit-learn: pip install scikit-learn") from error
    if method == "pca":
        pca = PCA(2, random_state=seed)
        points = pca.fit_transform(values)
        first, second = pca.explained_variance_ratio_
        return points, (f"first component ({first:.0%} of variance)", f"second ({second:.0%})")
    perplexity = min(30.0, (len(values) - 1) / 3)
    return TSNE(2, perplexity=perplexity, random_state=seed).fit_transform(values), ("t-SNE", "")


def _colours(count: int) -> Any:
    from matplotlib import colormaps

    if count <= 20:
        return colormaps["tab10" if count <= 10 else "tab20"]
    return colormaps["turbo"].resampled(count)
