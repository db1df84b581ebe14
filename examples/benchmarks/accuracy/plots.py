"""Accuracy against trainable parameters, and one row a variant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .tables import MEANS, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 6.9
"""In inches; the documentation shows 100 pixels for each, so that 8 points can be read."""

PLACES = ((8, 0, "left"), (-8, 0, "right"), (0, 10, "center"), (0, -10, "center"), (8, 10, "left"), (8, -10, "left"))
"""Where a label may stand beside its point: to the right, down, and how it is aligned."""


def plot_parameters(summaries: Sequence[Summary], mean: str = MEANS[0]) -> Figure:
    """One labelled point for each finished method, with the deviation over seeds.

    Args:
        summaries (`list[Summary]`): The methods.
        mean (`str`): Which mean, a key of their `means`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    points = {
        summary.method: (summary.adapted, summary.means[mean].mean, summary.means[mean].deviation or 0.0)
        for summary in summaries
        if mean in summary.means
    }
    for summary in summaries:
        if summary.method in points:
            ours = summary.method.startswith("E²VPT")
            axes.errorbar(
                *points[summary.method],
                fmt="o",
                markersize=5,
                capsize=3,
                color="tab:red" if ours else "tab:blue",
            )
    axes.set_xscale("symlog", linthresh=100)
    ticks = [0, *(10**power for power in range(3, 9) if 10 ** (power - 1) < max(x for x, *_ in points.values()))]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.margins(x=0.12, y=0.08)
    axes.set_xlabel("trainable parameters without the head")
    axes.set_ylabel(f"test accuracy in percent, {mean}")
    axes.grid(alpha=0.3)
    canvas.draw()
    _label(axes, points, canvas.get_renderer())
    return figure


def _label(axes: Axes, points: dict[str, tuple[float, float, float]], renderer: Any) -> None:
    """Names beside their points, each at the first place where it hides neither a point nor another name."""
    from matplotlib.transforms import Bbox

    bars = [axes.transData.transform([(x, y - spread), (x, y + spread)]) for x, y, spread in points.values()]
    taken = [Bbox([low - 5, high + 5]) for low, high in bars]
    inside = axes.get_window_extent(renderer)
    for name, (x, y, _) in points.items():
        for right, up, side in PLACES:
            text = axes.annotate(name, (x, y), (right, up), textcoords="offset points", ha=side, va="center", size=9)
            box = text.get_window_extent(renderer)
            fits = inside.x0 < box.x0 and box.x1 < inside.x1
            if fits and not any(box.overlaps(other) for other in taken):
                break
            text.remove()
        else:
            text = axes.annotate(name, (x, y), (8, 0), textcoords="offset points", va="center", size=9)
        taken.append(text.get_window_extent(renderer))


def plot_variants(summaries: Sequence[Summary], mean: str = MEANS[1]) -> Figure:
    """One row for each finished variant, in the order of the table, with its parameters beside its name.

    Args:
        summaries (`list[Summary]`): The variants.
        mean (`str`): Which mean, a key of their `means`; with one task they are all the same.
    """
    from matplotlib.figure import Figure

    finished = [summary for summary in summaries if mean in summary.means]
    figure = Figure(figsize=(WIDTH, 0.9 + 0.32 * len(finished)), layout="constrained")
    axes = figure.subplots()
    for row, summary in enumerate(finished):
        point = summary.means[mean]
        ours = summary.method == "E²VPT"
        axes.errorbar(
            point.mean,
            row,
            xerr=point.deviation or 0,
            fmt="o",
            capsize=3,
            color="tab:red" if ours else "tab:blue",
        )
    axes.set_yticks(range(len(finished)), [f"{summary.method}  ({summary.adapted:,.0f})" for summary in finished])
    axes.invert_yaxis()
    axes.margins(y=0.5 / max(len(finished), 1))
    tasks = sorted({task for summary in finished for task in summary.tasks})
    what = f"on {tasks[0]}" if len(tasks) == 1 else mean
    axes.set_xlabel(f"test accuracy in percent, {what}\n(in brackets: parameters without the head)")
    axes.grid(alpha=0.3, axis="x")
    return figure
