from __future__ import annotations

import sys

import pytest

pytest.importorskip("matplotlib")
from e2vpt_peft.plots.figure import new_figure, number_axis


def test_a_figure_belongs_to_no_window():
    from matplotlib import pyplot

    figure = new_figure(3, 2)
    assert tuple(figure.get_size_inches()) == (3, 2)
    assert pyplot.get_fignums() == []


def test_without_matplotlib_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        new_figure(3, 2)


TICKS = [(1, [0]), (4, [0, 1, 2, 3]), (16, [*range(16)]), (17, [*range(0, 17, 2)])]


@pytest.mark.parametrize(("count", "ticks"), TICKS)
def test_an_axis_has_whole_numbers_and_at_most_16(count, ticks):
    axes = new_figure(3, 2).add_subplot()
    number_axis(axes.xaxis, count)
    assert list(axes.get_xticks()) == ticks
