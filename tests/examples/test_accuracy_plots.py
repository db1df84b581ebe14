"""Pictures of the accuracies: every point has its name, and no name hides another."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg

from examples.benchmarks.accuracy.ablations import ABLATIONS
from examples.benchmarks.accuracy.plots import plot_parameters, plot_variants
from examples.benchmarks.accuracy.records import read_all
from examples.benchmarks.accuracy.tables import Summary, summarise

RESULTS = Path(__file__).parents[2] / "examples" / "benchmarks" / "results"


def summaries(what: str, file: str) -> list[Summary]:
    return summarise(read_all([RESULTS / file]), [method.name for method in ABLATIONS[what]])


def test_names_of_methods_stand_apart_and_inside() -> None:
    found = summaries("methods", "mini.jsonl")
    figure = plot_parameters(found)
    renderer = FigureCanvasAgg(figure).get_renderer()
    (axes,) = figure.axes
    boxes = {text.get_text(): text.get_window_extent(renderer) for text in axes.texts}
    assert set(boxes) == {summary.method for summary in found}
    assert not [pair for pair in combinations(boxes, 2) if boxes[pair[0]].overlaps(boxes[pair[1]])]
    inside = axes.get_window_extent(renderer)
    assert all(inside.x0 < box.x0 and box.x1 < inside.x1 for box in boxes.values())


def test_a_row_for_each_variant() -> None:
    found = summaries("importance", "importance.jsonl")
    (axes,) = plot_variants(found).axes
    rows = [label.get_text() for label in axes.get_yticklabels()]
    assert rows == [f"{summary.method}  ({summary.adapted:,.0f})" for summary in found]
    points = [container.lines[0].get_xydata()[0].tolist() for container in axes.containers]
    assert points == [[summary.means["mean of tasks"].mean, row] for row, summary in enumerate(found)]
    assert "sign_digits" in axes.get_xlabel()
