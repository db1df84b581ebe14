from __future__ import annotations

import threading

import pytest
import torch

from e2vpt_peft.adapter import PromptedAdapter
from e2vpt_peft.pruning.probe import Probe
from e2vpt_peft.route import Route
from e2vpt_peft.running_pass import RunningPass, running, running_pass

from .support.models import images, tiny_vit
from .support.prompted import with_prompts
from .support.reference import random_prompts

OUTSIDE = RunningPass()


def prompted(shallow=False):
    """A model with 4 visual and 2 key-value prompts, and its layers that have visual prompts."""
    model = with_prompts(tiny_vit(), random_prompts(tiny_vit(), 4, 2, shallow=shallow))
    return model, PromptedAdapter.find(model).visual_layers


@torch.no_grad()
def logits(model, **changes):
    with running(**changes):
        return model(pixel_values=images()).logits


def test_nothing_is_different_outside():
    assert running_pass() == OUTSIDE
    assert OUTSIDE.route is OUTSIDE.edit_prefix is OUTSIDE.token_bias is None


def test_inner_changes_join_the_outer_ones_and_are_undone_alone():
    route, bias = Route(["a"]), torch.zeros(1)
    with running(route=route):
        with running(token_bias=bias):
            assert running_pass() == RunningPass(route=route, token_bias=bias)
            with running(route=None):
                assert running_pass() == RunningPass(token_bias=bias)
            assert running_pass().route is route
        assert running_pass() == RunningPass(route=route)
    assert running_pass() == OUTSIDE


def test_an_error_undoes_the_changes():
    with running(route=Route(["a"])):
        outer = running_pass()
        with pytest.raises(ZeroDivisionError), running(token_bias=torch.zeros(1)):
            _ = 1 / 0
        assert running_pass() is outer
    assert running_pass() == OUTSIDE


def test_a_forward_pass_that_fails_leaves_no_changes():
    model, layers = prompted()
    before = logits(model)

    def fail(layer, prefix, batch_size):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        logits(model, edit_prefix=fail)
    assert running_pass() == OUTSIDE
    assert torch.equal(logits(model), before)


def test_what_is_unknown_is_refused_and_changes_nothing():
    with pytest.raises(TypeError, match="nonesuch"), running(nonesuch=1):
        pass
    assert running_pass() == OUTSIDE


def test_every_thread_has_its_own():
    seen = {}
    inside, checked = threading.Event(), threading.Event()

    def other():
        seen["before"] = running_pass()
        with running(route=Route(["b"])):
            inside.set()
            checked.wait(30)
            seen["inside"] = running_pass().route.adapters

    with running(route=Route(["a"])):
        thread = threading.Thread(target=other)
        thread.start()
        assert inside.wait(30)
        assert running_pass().route.adapters == ["a"]
        checked.set()
        thread.join()
    assert seen == {"before": OUTSIDE, "inside": ["b"]}
    assert running_pass() == OUTSIDE


def test_a_prefix_is_edited_in_every_layer():
    """Without its first 4 rows, which are the visual prompts, there are none."""
    model, layers = prompted()
    seen = []

    def without_visual_prompts(layer, prefix, batch_size):
        seen.append((layer, prefix.keys.shape, batch_size))
        return prefix._replace(keys=prefix.keys[:, 4:], values=prefix.values[:, 4:])

    prompts = random_prompts(tiny_vit(), 4, 2)
    prompts.visual = None
    expected = logits(with_prompts(tiny_vit(), prompts))
    torch.testing.assert_close(logits(model, edit_prefix=without_visual_prompts), expected)
    assert seen == [(layer, (1, 6, 4, 8), 3) for layer in layers]


def test_a_bias_on_shallow_tokens_is_added_to_the_attention_that_they_are_paid():
    """In all layers: of log 2 on a token, as if it were there twice; far below zero, as if it were not there."""
    model, (layer,) = prompted(shallow=True)
    (tokens,) = layer.e2vpt_visual_prompts.values()
    others = {"twice": tokens[[0, 0, 1, 2, 3]], "not at all": tokens[1:]}
    biases = {"twice": torch.tensor([2.0, 1, 1, 1]).log(), "not at all": torch.tensor([-1e9, 0, 0, 0])}
    for name, bias in biases.items():
        probe = Probe(PromptedAdapter.find(model), {"pixel_values": images()})
        expected = probe.output([others[name]]).logits
        torch.testing.assert_close(logits(model, token_bias=bias), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(model, token_bias=torch.zeros(4)), logits(model))
