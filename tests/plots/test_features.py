from __future__ import annotations

import pytest
import torch

pytest.importorskip("matplotlib")
from e2vpt_peft.plots import plot_features

LABELS = torch.arange(40) % 4
FEATURES = {"frozen": torch.randn(40, 8, requires_grad=True), "adapted": torch.randn(40, 6)}


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_every_model_has_a_panel_and_every_class_a_colour(method):
    figure = plot_features(FEATURES, LABELS, method=method, label_names=["a", "b", "c", "d"])
    assert [axes.get_title() for axes in figure.axes] == ["frozen", "adapted"]
    for axes in figure.axes:
        assert [len(line.get_xdata()) for line in axes.lines] == [10] * 4
        assert len({line.get_color() for line in axes.lines}) == 4
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b", "c", "d"]


def test_pca_keeps_a_plane_as_it_is():
    plane = torch.randn(40, 2).double()
    flat = torch.cat([plane, torch.zeros(40, 3)], 1)
    (axes,) = plot_features({"plane": flat}, torch.zeros(40)).axes
    points = torch.tensor(axes.lines[0].get_xydata())
    torch.testing.assert_close(torch.cdist(points, points), torch.cdist(plane, plane))
    assert "% of variance" in axes.get_xlabel()


def test_the_same_seed_gives_the_same_picture():
    first, second = (plot_features(FEATURES, LABELS, method="tsne").axes[0].lines[0] for _ in range(2))
    assert first.get_xydata().tolist() == second.get_xydata().tolist()


def test_other_methods_are_refused():
    with pytest.raises(ValueError, match="method='umap' must be 'pca' or 'tsne'"):
        plot_features(FEATURES, LABELS, method="umap")


def test_features_of_other_samples_are_refused():
    with pytest.raises(ValueError, match=r"features\['frozen'\] must be of shape \(39, size\)"):
        plot_features(FEATURES, LABELS[1:])
