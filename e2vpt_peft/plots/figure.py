"""A figure that belongs to no window."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that size in inches.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")


def number_axis(axis: Any, count: int, most: int = 16) -> None:
    """Ticks at whole numbers from 0, at most so many."""
    step = -(-count // most)
    axis.set_ticks(range(0, count, step))
