from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch.utils.data import DataLoader

from e2vpt_peft import E2VPTConfig, score_prompts
from e2vpt_peft.running_pass import RunningPass, passes_of

from ..support.models import images, prompt_parameters, tiny_vit
from .common import LABELS, adapted, all_methods, data, prompted


@all_methods
def test_model_gradients_mode_and_random_state_are_left_as_they_were(method):
    model = get_peft_model(tiny_vit(), E2VPTConfig(modules_to_save=["classifier"])).train()
    model.base_model.model.vit.layers[0].eval()
    model(pixel_values=images(), labels=LABELS[:3]).loss.backward()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    modes = [module.training for module in model.modules()]
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    dataset = [{"pixel_values": image, "labels": label} for image, label in zip(images(4), LABELS)]
    random_states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()

    score_prompts(model, DataLoader(dataset, batch_size=2, shuffle=True), method, progress_bar=False)

    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(gradients)
    assert all(torch.equal(model.get_parameter(n).grad, g) for n, g in gradients.items())
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable
    assert random.getstate() == random_states[0]
    assert np.random.get_state()[1].tolist() == random_states[1]
    assert torch.equal(torch.get_rng_state(), random_states[2])


def test_an_error_while_scoring_leaves_the_model_as_it_was():
    model = get_peft_model(tiny_vit(), E2VPTConfig()).train()
    with pytest.raises(ValueError, match="no loss for a batch of"):
        score_prompts(model, [{"pixel_values": images()}], progress_bar=False)
    assert model.training
    assert passes_of(model).current == RunningPass()


@all_methods
def test_batches_may_be_pairs(method):
    model = prompted(dtype=torch.float32)
    pairs = [(batch["pixel_values"], batch["labels"]) for batch in data()]
    ours, theirs = (score_prompts(model, batches, method, progress_bar=False) for batches in (data(), pairs))
    assert torch.equal(ours.tokens, theirs.tokens)
    assert torch.equal(ours.segments, theirs.segments)


@all_methods
def test_max_batches_uses_the_first_ones(method):
    model = prompted(dtype=torch.float32)
    first = score_prompts(model, data(1), method, progress_bar=False)
    limited = score_prompts(model, data(3), method, max_batches=1, progress_bar=False)
    assert torch.equal(first.tokens, limited.tokens)


@all_methods
def test_a_named_adapter_is_scored_though_another_is_active(method):
    model = get_peft_model(tiny_vit(), E2VPTConfig(modules_to_save=["classifier"]))
    model.add_adapter("other", E2VPTConfig(num_visual_prompts=3, modules_to_save=["classifier"]))
    named = score_prompts(model, data(), method, adapter_name="other", progress_bar=False)
    assert model.active_adapters == ["default"]
    assert model.base_model.model.vit.layers[0].attention.active_adapters == ["default"]
    assert named.tokens.shape == (3,)
    model.set_adapter("other")
    torch.testing.assert_close(score_prompts(model, data(), method, progress_bar=False).tokens, named.tokens)


def test_bad_input_is_refused_in_words():
    model = prompted(dtype=torch.float32)
    with pytest.raises(ValueError, match="method='best' must be one of 'removal'"):
        score_prompts(model, data(), "best")
    with pytest.raises(ValueError, match="no batch"):
        score_prompts(model, [], progress_bar=False)
    with pytest.raises(ValueError, match="a pair"):
        score_prompts(model, [images()], progress_bar=False)
    bad = [*data(), {"pixel_values": images(4) * float("nan"), "labels": LABELS}]
    with pytest.raises(FloatingPointError, match=f"batch {len(bad) - 1}.*NaN or infinite values in pixel_values"):
        score_prompts(model, bad, progress_bar=False)


@pytest.mark.parametrize(
    ("batches", "max_batches", "shown"),
    [
        (data(3), None, "3/3 "),
        (data(3), 2, "2/2 "),
        (iter(data(3)), 2, "2/2 "),
        (iter(data(3)), None, "3it "),
    ],
)
def test_the_bar_says_how_many_batches_there_are(batches, max_batches, shown, capsys):
    score_prompts(adapted(), batches, max_batches=max_batches)
    assert shown in capsys.readouterr().err


def test_the_bar_can_be_left_out(capsys):
    score_prompts(adapted(), data(2), progress_bar=False)
    assert capsys.readouterr().err == ""


def test_scores_of_zero_are_scores():
    model = adapted()
    with torch.no_grad():
        for prompts in prompt_parameters(model).values():
            prompts.zero_()
    found = score_prompts(model, data(1), "first_order", progress_bar=False)
    assert found.segments.count_nonzero() == 0
