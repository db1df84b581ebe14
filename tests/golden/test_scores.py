"""Scores, orders and masks of the published code and of the paper's absolute variant."""

from __future__ import annotations

import pytest
import torch

from e2vpt_peft import prune_prompts, score_prompts
from e2vpt_peft.masks import select

from .test_forward import golden_model, load

PERCENTS = [10, 20, 30, 40, 50, 60, 70, 80, 90]


def batches(golden):
    return [(golden[f"batch{i}.pixel_values"], golden[f"batch{i}.labels"]) for i in range(3)]


@pytest.mark.parametrize("prefix", ["", "shallow."])
@pytest.mark.parametrize(("method", "suffix"), [("signed", ""), ("absolute", "_abs")])
def test_scores_are_those_of_the_published_code(prefix, method, suffix):
    golden = load("importance", torch.float64)
    shallow = {"visual_prompt_depth": "shallow"} if prefix else {}
    if prefix:
        golden["visual_prompts"], golden["kv_prompts"] = (
            load("vit_shallow", torch.float64)["visual_prompts"],
            load("vit_shallow", torch.float64)["kv_prompts"],
        )
    model = golden_model(golden, torch.float64, **shallow)
    scores = score_prompts(model, batches(golden), method, progress_bar=False)
    torch.testing.assert_close(scores.tokens, golden[f"{prefix}token_importance{suffix}"], rtol=0, atol=1e-12)
    torch.testing.assert_close(scores.segments, golden[f"{prefix}segment_importance{suffix}"], rtol=0, atol=1e-12)


def test_scores_in_float32_are_those_of_the_published_code_to_rounding():
    golden = load("importance", torch.float32)
    scores = score_prompts(golden_model(golden, torch.float32), batches(golden), "signed", progress_bar=False)
    torch.testing.assert_close(scores.tokens.float(), golden["token_importance"], rtol=0, atol=1e-7)
    torch.testing.assert_close(scores.segments.float(), golden["segment_importance"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("method", "name"), [("signed", "official"), ("absolute", "abs")])
def test_what_is_pruned_first_is_what_the_published_code_prunes_first(method, name):
    golden = load("importance", torch.float64)
    scores = score_prompts(golden_model(golden, torch.float64), batches(golden), method, progress_bar=False)
    assert torch.equal(scores.tokens.argsort(stable=True), golden[f"{name}.token_order"])
    assert torch.equal(scores.segments.argsort(dim=-1, stable=True), golden[f"{name}.segment_order"])


@pytest.mark.parametrize("name", ["official", "synthetic"])
def test_masks_are_those_of_the_published_code_with_ties_to_the_lower_index(name):
    golden = load("importance", torch.float64)
    prefix = f"{name}."
    if name == "official":
        scores = score_prompts(golden_model(golden, torch.float64), batches(golden), "signed", progress_bar=False)
        token_scores, segment_scores = scores.tokens, scores.segments
    else:
        token_scores, segment_scores = golden["synthetic.token_scores"], golden["synthetic.segment_scores"]
    for index, percent in enumerate(PERCENTS):
        mask = select(token_scores, torch.ones_like(token_scores, dtype=torch.bool), 1, rate=percent / 100)
        assert torch.equal(mask, golden[f"{prefix}token_masks"][index].bool())
        assert int((~mask).sum()) == golden[f"{prefix}tokens_masked"][index]
    for index, masks in enumerate(golden[f"{prefix}segment_masks"]):
        present = torch.ones_like(segment_scores, dtype=torch.bool)
        chosen = select(segment_scores, present, 4, rate=PERCENTS[index] / 100)
        assert torch.equal(chosen, masks.bool())


def test_leave_one_out_is_the_true_change_of_the_loss():
    """The file has the change when a token is zeroed; here the model with it removed is run for comparison."""
    golden = load("importance", torch.float64)
    model = golden_model(golden, torch.float64)
    data = batches(golden)
    scores = score_prompts(model, data, "leave_one_out", progress_bar=False)

    def loss(model):
        with torch.no_grad():
            return torch.stack([model(pixel_values=x, labels=y).loss for x, y in data]).mean()

    base = loss(model)
    for token in range(4):
        smaller = golden_model(golden, torch.float64)
        prune_prompts(smaller, token_mask=[index != token for index in range(4)])
        torch.testing.assert_close(scores.tokens[token], loss(smaller) - base, rtol=0, atol=1e-12)
        for segment in range(8):
            mask = torch.ones(4, 8, dtype=torch.bool)
            mask[token, segment] = False
            smaller = golden_model(golden, torch.float64)
            prune_prompts(smaller, segment_mask=mask)
            torch.testing.assert_close(scores.segments[token, segment], loss(smaller) - base, rtol=0, atol=1e-12)
