from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from e2vpt_peft import score_prompts
from e2vpt_peft.pruning import segment_removal
from e2vpt_peft.running_pass import passes_of

from ..support.adapted import adapt, inputs, make
from ..support.models import SIZES, randomized, tiny_vit
from ..support.prompted import with_prompts
from ..support.reference import random_prompts
from .common import LABELS, data, double, prompted


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

        with passes_of(model).running(edit_prefix=move):
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


def test_only_a_plain_cross_entropy_of_one_label_for_each_sample_is_one():
    """Of others, though PyTorch calls them so, too, no logit of a sample's own label can be followed."""
    logits, labels = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    loss = torch.nn.functional.cross_entropy(logits, labels)
    assert segment_removal._is_cross_entropy(loss, logits, labels)
    assert not segment_removal._is_cross_entropy(loss + 0.1, logits, labels)
    for others in (
        (torch.randn(4, 5, 3), torch.zeros(4, 3, dtype=torch.long)),  # one for each pixel
        (logits, torch.tensor([0, 1, 2, -100])),  # a sample that is left out
        (logits, torch.randn(4, 5).softmax(-1)),  # shares of labels
    ):
        assert not segment_removal._is_cross_entropy(torch.nn.functional.cross_entropy(*others), *others)
    hot, dense = torch.eye(4, 5).long(), torch.randn(4, 5, 3)
    for others in ((logits, hot), (logits, labels.float()), (dense, labels), (None, labels), (logits, None)):
        assert not segment_removal._is_cross_entropy(loss, *others)


@torch.no_grad()
def test_windows_belong_to_their_samples():
    model = adapt(make("swin"))
    batch = {**inputs("swin", 3), "labels": torch.tensor([0, 1, 2])}
    alone = [{name: value[index : index + 1] for name, value in batch.items()} for index in range(3)]
    whole, parts = (score_prompts(model, batches, progress_bar=False).segments for batches in ([batch], alone))
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-6)
    exact = score_prompts(model, [batch], "leave_one_out", progress_bar=False).segments
    assert torch.corrcoef(torch.stack([whole.flatten(), exact.flatten()]))[0, 1] > 0.9


def test_half_precision_without_a_norm_in_front_of_the_attention():
    """Where there is none, prompts of float32 go to projections of another type."""
    sizes = {name: SIZES[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_labels")}
    bert = BertForSequenceClassification(BertConfig(**sizes, intermediate_size=64, vocab_size=50))
    model = adapt(randomized(bert))
    batch = {"input_ids": torch.arange(24).view(4, 6), "labels": LABELS}
    full = score_prompts(model, [batch], "removal", progress_bar=False)
    for name, parameter in model.named_parameters():
        if "e2vpt_" not in name:
            parameter.data = parameter.data.bfloat16()
    half = score_prompts(model, [batch], "removal", progress_bar=False)
    assert torch.corrcoef(torch.stack([full.segments.flatten(), half.segments.flatten()]))[0, 1] > 0.9
