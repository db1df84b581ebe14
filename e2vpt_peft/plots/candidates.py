"""The candidates of a search, as accuracy against parameters."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .figure import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_candidates(results: dict[str, Any] | str | PathLike[str]) -> Figure:
    """The metric of every candidate against its parameters.

    Args:
        results (`dict` or path): The content of a `pruning_results.json`, or where it is.

    Returns:
        `matplotlib.figure.Figure`: It belongs to no window: `savefig` it, or show it in a notebook.

    Raises:
        ImportError: matplotlib is not installed.

    Example:

        ```py
        >>> plot_candidates("out/pruning_results.json").savefig("candidates.png")
        ```
    """
    figure = new_figure(6.5, 4.2)
    table: dict[str, Any] = results if isinstance(results, dict) else json.loads(Path(results).read_text())
    unpruned, *candidates = table["candidates"]
    # Candidates that dropped out early were trained for less and are no fair comparison.
    dropped = [row for row in candidates if row["phase"] != row["name"]]
    finished = [row for row in candidates if row["phase"] == row["name"]]
    axes = figure.add_subplot()
    if dropped:
        axes.plot(*_points(dropped), "o", color="0.8", label="dropped out early")
    axes.plot(*_points(finished), "o", color="tab:blue", label="pruned, rewound, retrained")
    axes.plot(*_points([unpruned]), "s", color="black", label="unpruned")
    best = [row for row in table["candidates"] if row["name"] == table["best"]]
    axes.plot(*_points(best), "o", markersize=12, fillstyle="none", color="tab:red", label="kept")
    axes.set_xlabel("parameters of the prompts")
    axes.set_ylabel(table["metric"].replace("eval_", "validation "))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure


def _points(rows: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    return [row["parameters"] for row in rows], [row["metric"] for row in rows]
