from __future__ import annotations

import pytest
import torch

from e2vpt_peft import prune_prompts, score_prompts
from e2vpt_peft.pruning import SCORING_METHODS
from e2vpt_peft.running_pass import running

from .common import all_methods, data, double, prompted


@all_methods
@pytest.mark.parametrize("shallow", [False, True])
def test_scores_have_the_documented_shapes_and_types(method, shallow):
    scores = score_prompts(prompted(shallow, torch.float32), data(), method, progress_bar=False)
    assert (scores.tokens.shape, scores.segments.shape) == ((4,), (4, 8))
    assert scores.tokens.dtype == scores.segments.dtype == torch.float64
    assert scores.method == method
    assert not scores.tokens.requires_grad
    assert not scores.segments.requires_grad
    assert scores.tokens.any()
    assert scores.segments.any()


def test_the_attention_gate_is_the_derivative_of_the_loss_by_a_bias_on_attention():
    model = prompted()
    batch = double(data(1))
    scores = score_prompts(model, batch, "attention_gate", progress_bar=False)

    def loss(token, step):
        def edit(layer, prefix, batch_size):
            bias = torch.zeros(1, prefix.keys.shape[1], dtype=torch.float64)
            bias[0, token] = step
            return prefix._replace(bias=bias)

        with running(edit_prefix=edit):
            return model(**batch[0]).loss.item()

    for token in range(4):
        numeric = (loss(token, 1e-5) - loss(token, -1e-5)) / 2e-5
        assert scores.tokens[token].item() == pytest.approx(abs(numeric), rel=1e-5, abs=1e-9)


@all_methods
@pytest.mark.parametrize("shallow", [False, True])
def test_a_pruned_adapter_can_be_scored(method, shallow):
    model = prompted(shallow, torch.float32)
    scores = score_prompts(model, data(), method, progress_bar=False)
    prune_prompts(model, scores, token_rate=0.5, segment_rate=0.5)
    again = score_prompts(model, data(), method, progress_bar=False)
    assert again.segments.shape == (2, 8)
    mask = torch.tensor(model.peft_config["default"].segment_mask)[model.peft_config["default"].token_mask]
    torch.testing.assert_close(again.segments[~mask], torch.zeros(8, dtype=torch.float64), rtol=0, atol=1e-6)


@all_methods
def test_autocast_is_followed(method):
    model = prompted(dtype=torch.float32)
    exact = score_prompts(model, data(), method, progress_bar=False)
    with torch.autocast("cpu", torch.bfloat16):
        rough = score_prompts(model, data(), method, progress_bar=False)
    assert not torch.equal(exact.segments, rough.segments)
    assert torch.corrcoef(torch.stack([exact.segments.flatten(), rough.segments.flatten()]))[0, 1] > 0.9


@pytest.mark.parametrize("method", SCORING_METHODS)
def test_scores_under_float16_autocast_are_those_of_float32(method):
    model = prompted(dtype=torch.float32)
    exact = score_prompts(model, data(), method, progress_bar=False).segments
    with torch.autocast("cpu", torch.float16):
        half = score_prompts(model, data(), method, progress_bar=False).segments
    assert torch.corrcoef(torch.stack([exact.flatten(), half.flatten()]))[0, 1] > 0.99
