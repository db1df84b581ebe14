from __future__ import annotations

import pytest
import torch

from e2vpt_peft import prune_prompts, score_prompts, score_prompts_by_layer
from e2vpt_peft.adapter import PromptedAdapter

from .common import LABELS, data, double, prompted


def test_every_layer_has_its_scores():
    scores = score_prompts_by_layer(prompted(), double(data()), progress_bar=False)
    assert (scores.tokens.shape, scores.segments.shape) == ((3, 4), (3, 4, 8))
    assert scores.tokens.dtype == scores.segments.dtype == torch.float64
    assert scores.tokens.any(1).all()


def test_segments_of_a_single_layer_have_the_score_that_prunes():
    model, batches = prompted(layers_to_transform=[1]), double(data())
    by_layer = score_prompts_by_layer(model, batches, progress_bar=False)
    together = score_prompts(model, batches, "removal", progress_bar=False)
    assert by_layer.segments.shape == (1, 4, 8)
    torch.testing.assert_close(by_layer.segments[0], together.segments)


def test_segments_of_linear_losses_add_up_over_the_layers():
    model = prompted()
    model.base_model.model.config.problem_type = "multi_label_classification"
    labels = torch.nn.functional.one_hot(LABELS, 5).double()
    batches = [{**batch, "labels": labels} for batch in double(data())]
    by_layer = score_prompts_by_layer(model, batches, progress_bar=False)
    together = score_prompts(model, batches, "removal", progress_bar=False)
    torch.testing.assert_close(by_layer.segments.sum(0), together.segments)


@pytest.mark.parametrize("shallow", [False, True])
def test_a_token_is_left_out_of_one_layer_only(shallow):
    model, (batch,) = prompted(shallow), double(data(1))
    scores = score_prompts_by_layer(model, [batch], progress_bar=False)
    with torch.no_grad():
        loss = model(**batch).loss
        if shallow:  # in one layer they are left out of all
            prune_prompts(model, token_mask=[True, True, False, True])
        else:
            prompts = PromptedAdapter.find(model).layers[-1].e2vpt_visual_prompts
            prompts["default"] = torch.nn.Parameter(prompts["default"][[0, 1, 3]])
        without = model(**batch).loss
    torch.testing.assert_close(scores.tokens[-1, 2], without - loss)


def test_shallow_prompts_have_one_layer_with_the_scores_that_prune():
    model, batches = prompted(shallow=True), double(data())
    by_layer = score_prompts_by_layer(model, batches, progress_bar=False)
    together = score_prompts(model, batches, "removal", progress_bar=False)
    torch.testing.assert_close(by_layer.tokens[0], together.tokens)
    torch.testing.assert_close(by_layer.segments[0], together.segments)


def test_pruned_prompts_have_no_score():
    model = prompted()
    prune_prompts(model, token_mask=[True, False, True, False])
    scores = score_prompts_by_layer(model, double(data()), progress_bar=False)
    assert scores.segments.shape == (3, 2, 8)


def test_they_are_not_to_prune_by():
    model = prompted()
    scores = score_prompts_by_layer(model, double(data()), progress_bar=False)
    with pytest.raises(ValueError, match="score it again"):
        prune_prompts(model, scores, token_rate=0.5)
