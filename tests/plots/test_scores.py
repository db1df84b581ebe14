from __future__ import annotations

import numpy as np
import pytest

from e2vpt_peft import prune_prompts, score_prompts, score_prompts_by_layer

from ..pruning.common import data, prompted

pytest.importorskip("matplotlib")
from e2vpt_peft.plots import plot_importance


def pictures(figure):
    """The arrays that are shown: tokens, segments, and the strips below them."""
    tokens, tokens_strip, segments, segments_strip = (axes.images[0].get_array() for axes in figure.axes[:4])
    return [tokens, segments, tokens_strip, segments_strip]


def test_layers_are_rows_and_prompts_columns():
    model = prompted()
    scores = score_prompts_by_layer(model, data(), progress_bar=False)
    tokens, segments, *_ = pictures(plot_importance(model, scores))
    np.testing.assert_array_equal(tokens, scores.tokens)
    np.testing.assert_array_equal(segments, scores.segments.flatten(1))


def test_what_is_pruned_is_marked():
    model = prompted()
    scores = score_prompts_by_layer(model, data(), progress_bar=False)
    keep = [[segment < 6 for segment in range(8)] for _ in range(4)]
    prune_prompts(model, token_mask=[True, False, True, True], segment_mask=None)
    prune_prompts(model, segment_mask=[keep[0], keep[2], keep[3]])
    *_, kept_tokens, kept_segments = pictures(plot_importance(model, scores))
    assert kept_tokens.tolist() == [[True, False, True, True]]
    assert kept_segments.reshape(4, 8).tolist() == [keep[0], [False] * 8, keep[2], keep[3]]


def test_scores_of_a_pruned_adapter_stand_at_the_places_of_its_prompts():
    model = prompted()
    prune_prompts(model, token_mask=[True, False, True, True])
    scores = score_prompts(model, data(), progress_bar=False)
    tokens, *_ = pictures(plot_importance(model, scores))
    assert np.ma.getmaskarray(np.ma.masked_invalid(tokens)).tolist() == [[False, True, False, False]]
    np.testing.assert_array_equal(np.asarray(tokens)[0, [0, 2, 3]], scores.tokens)


def test_scores_of_another_adapter_are_refused():
    model = prompted()
    scores = score_prompts(model, data(), progress_bar=False)
    prune_prompts(model, token_count=1, scores=scores)
    other = score_prompts(model, data(), progress_bar=False)
    prune_prompts(model, token_count=1, scores=other)
    with pytest.raises(ValueError, match="scores are for 3 visual prompts"):
        plot_importance(model, other)
