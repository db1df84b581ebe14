from __future__ import annotations

import math

import pytest
import torch

from e2vpt_peft import prune_prompts, score_prompts
from e2vpt_peft.adapter import PromptedAdapter
from e2vpt_peft.pruning import SCORING_METHODS
from e2vpt_peft.pruning.probe import Probe
from e2vpt_peft.running_pass import RunningPass, passes_of

from ..peft_contract.common import assert_unchanged, snapshot
from ..support.adapted import adapt, inputs, make
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


class TestAttentionGate:
    """By a bias on the attention that a token is paid, also where attention is written out (eager)."""

    CASES = [("vit", "sdpa"), ("swin", "sdpa"), ("swinv2", "eager"), ("data2vec-vision", "eager")]
    cases = pytest.mark.parametrize(("name", "attention"), CASES)

    def model_and_batch(self, name, attention):
        model = adapt(make(name, attention)).double()
        batch = {key: value.double() for key, value in inputs(name, 3).items()}
        return model, {**batch, "labels": torch.tensor([0, 1, 2])}

    @staticmethod
    @torch.no_grad()
    def loss(model, batch, token, bias):
        def edit(layer, prefix, batch_size):
            added = torch.zeros(1, prefix.keys.shape[1], dtype=torch.float64)
            added[0, token] = bias
            return prefix._replace(bias=added)

        with passes_of(model).running(edit_prefix=edit):
            return model(**batch).loss.item()

    @cases
    def test_it_is_the_derivative_of_the_loss_by_that_bias(self, name, attention):
        model, batch = self.model_and_batch(name, attention)
        scores = score_prompts(model, [batch], "attention_gate", progress_bar=False)
        for token in range(3):
            numeric = (self.loss(model, batch, token, 1e-5) - self.loss(model, batch, token, -1e-5)) / 2e-5
            assert abs(numeric) > 1e-6
            assert scores.tokens[token].item() == pytest.approx(abs(numeric), rel=1e-5, abs=1e-9)

    @cases
    @pytest.mark.parametrize("times", [2, 3])
    def test_that_bias_is_what_having_a_prompt_several_times_is(self, name, attention, times):
        model, batch = self.model_and_batch(name, attention)
        layers = PromptedAdapter.find(model).layers
        for token in range(3):
            rows = [0, 1, 2, *[token] * (times - 1)]
            probe = Probe(PromptedAdapter.find(model), batch)
            expected = probe.value([layer.kept_prompts("default")[rows] for layer in layers]).item()
            assert self.loss(model, batch, token, math.log(times)) == pytest.approx(expected, rel=1e-10)
            assert self.loss(model, batch, token, 0.0) != pytest.approx(expected, rel=1e-5)

    def test_of_shallow_prompts_it_is_the_derivative_by_a_bias_in_all_layers(self):
        model, (batch,) = prompted(shallow=True), double(data(1))
        scores = score_prompts(model, [batch], "attention_gate", progress_bar=False)

        @torch.no_grad()
        def loss(token, bias):
            with passes_of(model).running(
                token_bias=torch.zeros(4, dtype=torch.float64).index_fill(0, torch.tensor(token), bias)
            ):
                return model(**batch).loss.item()

        for token in range(4):
            numeric = (loss(token, 1e-5) - loss(token, -1e-5)) / 2e-5
            assert scores.tokens[token].item() == pytest.approx(abs(numeric), rel=1e-5, abs=1e-9)

    @pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
    @pytest.mark.parametrize("shallow", [False, True])
    def test_implementations_that_take_no_bias_are_refused_and_the_model_is_left_as_it_was(
        self, implementation, shallow
    ):
        model = prompted(shallow, torch.float32).train()
        before = snapshot(model)
        config = model.base_model.model.config
        implementation_before = config._attn_implementation
        config._attn_implementation_internal = implementation  # without asking whether it is installed
        with pytest.raises(ValueError, match=f"'{implementation}' takes no bias.*'attention_gate'.*'sdpa'.*'eager'"):
            score_prompts(model, data(1), "attention_gate", progress_bar=False)
        config._attn_implementation_internal = implementation_before
        assert_unchanged(model, before)
        assert model.training and model.active_adapters == ["default"]
        assert passes_of(model).current == RunningPass()


class TestDefinitions:
    """What each score says is computed here once more, from other losses and gradients."""

    @torch.no_grad()
    def test_leaving_out_is_the_change_of_the_loss_of_a_pruned_adapter(self):
        model, (batch,) = prompted(), double(data(1))
        scores = score_prompts(model, [batch], "leave_one_out", progress_bar=False)
        whole = model(**batch).loss
        for token in range(4):
            pruned = prompted()
            prune_prompts(pruned, token_mask=[other != token for other in range(4)])
            torch.testing.assert_close(scores.tokens[token], pruned(**batch).loss - whole)
        for token, segment in ((0, 0), (2, 5), (3, 7)):
            pruned, mask = prompted(), torch.ones(4, 8, dtype=torch.bool)
            mask[token, segment] = False
            prune_prompts(pruned, segment_mask=mask)
            torch.testing.assert_close(scores.segments[token, segment], pruned(**batch).loss - whole)

    @pytest.mark.parametrize("shallow", [False, True])
    def test_signed_is_the_derivative_by_a_factor_and_the_others_follow_from_it(self, shallow):
        model, (batch,) = prompted(shallow), double(data(1))
        probe = Probe(PromptedAdapter.find(model), batch)
        tokens = torch.ones(4, 1, requires_grad=True, dtype=torch.float64)
        segments = torch.ones(4, 8, requires_grad=True, dtype=torch.float64)
        factor = tokens * segments.repeat(1, 4)  # a comb
        loss = probe.loss([prompts * factor for prompts in probe.prompts])
        by_token, by_segment = torch.autograd.grad(loss, [tokens, segments])
        assert by_segment.abs().min() > 1e-5
        assert shallow is bool(by_token.abs().min() > 1e-5), "a norm does not see the scale of a deep prompt"
        found = {
            method: score_prompts(model, [batch], method, progress_bar=False)
            for method in ("signed", "absolute", "first_order")
        }
        for method, same in (("signed", lambda x: x), ("absolute", torch.abs), ("first_order", torch.neg)):
            torch.testing.assert_close(found[method].tokens, same(by_token[:, 0]), msg=method)
            torch.testing.assert_close(found[method].segments, same(by_segment), msg=method)

    def test_scores_are_the_mean_over_batches(self):
        model, batches = prompted(), double(data(3))
        for method in SCORING_METHODS:
            whole = score_prompts(model, batches, method, progress_bar=False)
            parts = [score_prompts(model, [batch], method, progress_bar=False) for batch in batches]
            torch.testing.assert_close(whole.tokens, torch.stack([part.tokens for part in parts]).mean(0))
            torch.testing.assert_close(whole.segments, torch.stack([part.segments for part in parts]).mean(0))

    @pytest.mark.parametrize("shallow", [False, True])
    def test_a_single_token_has_nothing_to_be_compared_with(self, shallow):
        model = prompted(shallow, torch.float32)
        prune_prompts(model, token_mask=[False, True, False, False])
        for method in ("removal", "leave_one_out"):
            assert score_prompts(model, data(1), method, progress_bar=False).tokens.tolist() == [0]


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
