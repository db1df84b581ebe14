from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from e2vpt_peft.plots import plot_candidates


def row(name: str, parameters: int, metric: float, phase: str | None = None) -> dict[str, object]:
    return {"name": name, "parameters": parameters, "metric": metric, "phase": phase or name}


RESULTS = {
    "metric": "eval_accuracy",
    "best": "candidate-2",
    "candidates": [
        row("unpruned", 100, 0.9, "tune"),
        row("candidate-1", 80, 0.5, "candidate-1-4"),
        row("candidate-2", 60, 0.8),
        row("candidate-3", 40, 0.7),
    ],
}


def points(figure) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): list(zip(line.get_xdata(), line.get_ydata())) for line in figure.axes[0].lines}


def test_every_candidate_is_a_point_and_those_that_dropped_out_are_told_apart():
    figure = plot_candidates(RESULTS)
    assert points(figure) == {
        "dropped out early": [(80, 0.5)],
        "pruned, rewound, retrained": [(60, 0.8), (40, 0.7)],
        "unpruned": [(100, 0.9)],
        "kept": [(60, 0.8)],
    }
    assert figure.axes[0].get_ylabel() == "validation accuracy"


def test_results_may_be_a_file(tmp_path: Path):
    path = tmp_path / "pruning_results.json"
    path.write_text(json.dumps(RESULTS))
    assert points(plot_candidates(path)) == points(plot_candidates(str(path))) == points(plot_candidates(RESULTS))


def test_without_matplotlib_it_says_what_it_needs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install matplotlib"):
        plot_candidates({})
