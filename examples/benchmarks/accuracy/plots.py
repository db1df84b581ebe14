"""Accuracy against trainable parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .tables import MEANS, Summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_parameters(summaries: Sequence[Summary], mean: str = MEANS[0]) -> Figure:
    """One point for each finished method, with the deviation over seeds.

    Args:
        summaries (`list[Summary]`): The methods.
        mean (`str`): Which mean, a key of their `means`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for summary in summaries:
        if mean in summary.means:
            point = summary.means[mean]
            axes.errorbar(summary.adapted, point.mean, point.deviation or 0, fmt="o", capsize=3, label=summary.method)
    axes.set_xscale("symlog", linthresh=100)
    axes.set_xlabel("trainable parameters without the head")
    axes.set_ylabel(f"test accuracy in percent, {mean}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure
