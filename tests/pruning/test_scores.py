from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch.utils.data import DataLoader

from e2vpt_peft import E2VPTConfig, prune_prompts, score_prompts
from e2vpt_peft.pruning import SCORING_METHODS, segment_removal
from e2vpt_peft.pruning.gradients import gradients_of
from e2vpt_peft.running_pass import RunningPass, running, running_pass

from ..attention.test_architectures import adapt, inputs, make
from ..support.models import images, tiny_vit
from ..support.prompted import with_prompts
from ..support.reference import random_prompts

all_methods = pytest.mark.parametrize("method", SCORING_METHODS)
LABELS = torch.tensor([0, 1, 2, 3])


def data(batches=2):
    return [{"pixel_values": images(4, seed=seed), "labels": LABELS} for seed in range(batches)]


def prompted(shallow=False, dtype=torch.float64, scale=1.0, **config):
    prompts = random_prompts(tiny_vit(), 4, 2, shallow=shallow)
    prompts.visual *= scale
    return with_prompts(tiny_vit().to(dtype), prompts, num_segments=8, **config)


def double(batches):
    return [{**batch, "pixel_values": batch["pixel_values"].double()} for batch in batches]


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
    assert running_pass() == RunningPass()


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


@pytest.mark.parametrize("shallow", [False, True])
def test_the_default_agrees_with_leaving_out_for_small_segments(shallow):
    """With many segments, each is a small part of its token, and the first-order change is the change."""
    prompts = random_prompts(tiny_vit(), 4, 2, shallow=shallow)
    model = with_prompts(tiny_vit().double(), prompts, num_segments=32)
    fast = score_prompts(model, double(data()), "removal", progress_bar=False)
    exact = score_prompts(model, double(data()), "leave_one_out", progress_bar=False)
    assert torch.equal(fast.tokens, exact.tokens)
    correlation = torch.corrcoef(torch.stack([fast.segments.flatten(), exact.segments.flatten()]))[0, 1]
    assert correlation > 0.9


def changes_by_definition(model, batch, segments=8):
    """The loss at logits that move by their derivatives with respect to keys and values, sample by sample."""
    layers = [layer.attention for layer in model.base_model.model.vit.layers]
    prompts = [layer.kept_prompts("default").detach() for layer in layers]
    rows = [torch.stack(layer.project_prompts(tokens)).detach() for layer, tokens in zip(layers, prompts)]

    def logits(image, moved):
        moved = dict(zip(layers, moved))

        def move(layer, prefix, batch_size):
            whole = [torch.cat([new[None], old[:, len(new) :]], 1) for new, old in zip(moved[layer], prefix[:2])]
            return prefix._replace(keys=whole[0], values=whole[1])

        with running(edit_prefix=move):
            return model(pixel_values=image[None]).logits[0]

    changes = torch.zeros(len(prompts[0]), segments, dtype=torch.float64)
    for image, label in zip(batch["pixel_values"], batch["labels"]):
        jacobian = torch.autograd.functional.jacobian(lambda *moved, image=image: logits(image, moved), tuple(rows))
        at = logits(image, rows).detach()
        for token, segment in np.ndindex(*changes.shape):
            step = torch.zeros_like(at)
            for layer, tokens, here, derivative in zip(layers, prompts, rows, jacobian):
                without = tokens.clone()
                without[token, segment::segments] = 0
                difference = torch.stack(layer.project_prompts(without)).detach() - here
                step += (derivative * difference).flatten(1).sum(1)
            losses = [torch.nn.functional.cross_entropy(value, label) for value in (at + step, at)]
            changes[token, segment] += (losses[0] - losses[1]) / len(batch["labels"])
    return changes


def test_the_default_scores_segments_by_the_loss_at_logits_that_move_linearly():
    model = prompted()
    batch = double(data(1))[0]
    scores = score_prompts(model, [batch], "removal", progress_bar=False)
    torch.testing.assert_close(scores.segments, changes_by_definition(model, batch), rtol=1e-6, atol=1e-9)


def test_of_many_classes_the_likeliest_and_the_label_are_followed(monkeypatch):
    model = prompted()
    batch = double(data())
    every = score_prompts(model, batch, "removal", progress_bar=False).segments
    monkeypatch.setattr(segment_removal, "MOST_CLASSES", 3)
    some = score_prompts(model, batch, "removal", progress_bar=False).segments
    assert not torch.equal(some, every)
    assert torch.corrcoef(torch.stack([some.flatten(), every.flatten()]))[0, 1] > 0.9


def test_other_losses_than_cross_entropy_are_taken_as_linear():
    model = prompted()
    model.base_model.model.config.problem_type = "multi_label_classification"
    labels = torch.nn.functional.one_hot(LABELS, 5).double()
    batch = {**double(data(1))[0], "labels": labels}
    alone = [{name: value[index : index + 1] for name, value in batch.items()} for index in range(4)]
    whole = score_prompts(model, [batch], "removal", progress_bar=False).segments
    parts = score_prompts(model, alone, "removal", progress_bar=False).segments
    torch.testing.assert_close(whole, parts)  # as derivatives of a mean are
    exact = score_prompts(model, [batch], "leave_one_out", progress_bar=False).segments
    assert torch.corrcoef(torch.stack([whole.flatten(), exact.flatten()]))[0, 1] > 0.5


@torch.no_grad()
def test_windows_belong_to_their_samples():
    model = adapt(make("swin"))
    batch = {**inputs("swin", 3), "labels": torch.tensor([0, 1, 2])}
    alone = [{name: value[index : index + 1] for name, value in batch.items()} for index in range(3)]
    whole, parts = (score_prompts(model, batches, progress_bar=False).segments for batches in ([batch], alone))
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-6)
    exact = score_prompts(model, [batch], "leave_one_out", progress_bar=False).segments
    assert torch.corrcoef(torch.stack([whole.flatten(), exact.flatten()]))[0, 1] > 0.9


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


def test_small_gradients_survive_float16():
    """Of a model that is sure of its answers, most are below what float16 has."""
    values = torch.ones(3, requires_grad=True)
    loss = values.half().float().sum() * 1e-9
    (vanished,) = torch.autograd.grad(loss, [values], retain_graph=True)
    assert vanished.count_nonzero() == 0
    (gradient,) = gradients_of(loss, [values])
    torch.testing.assert_close(gradient, torch.full((3,), 1e-9, dtype=torch.float64), rtol=1e-2, atol=0)


def test_gradients_that_are_too_large_when_scaled_are_computed_with_a_smaller_scale():
    values = torch.ones(3, requires_grad=True)
    loss = (values.half().float() * 30000).sum()
    (gradient,) = gradients_of(loss, [values])
    torch.testing.assert_close(gradient, torch.full((3,), 30000.0, dtype=torch.float64), rtol=1e-3, atol=0)


@pytest.mark.parametrize("method", SCORING_METHODS)
def test_scores_under_float16_autocast_are_those_of_float32(method):
    model = prompted(dtype=torch.float32)
    exact = score_prompts(model, data(), method, progress_bar=False).segments
    with torch.autocast("cpu", torch.float16):
        half = score_prompts(model, data(), method, progress_bar=False).segments
    assert torch.corrcoef(torch.stack([exact.flatten(), half.flatten()]))[0, 1] > 0.99
