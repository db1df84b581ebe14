from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch

from e2vpt_peft.adapter import PromptedAdapter
from e2vpt_peft.pruning.probe import Probe
from e2vpt_peft.route import Route
from e2vpt_peft.running_pass import Passes, RunningPass, passes_of

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
    with passes_of(model).running(**changes):
        return model(pixel_values=images()).logits


def test_nothing_is_different_outside():
    assert Passes().current == OUTSIDE
    assert OUTSIDE.route is OUTSIDE.edit_prefix is OUTSIDE.token_bias is None


def test_inner_changes_join_the_outer_ones_and_are_undone_alone():
    passes, route, bias = Passes(), Route(["a"]), torch.zeros(1)
    with passes.running(route=route):
        with passes.running(token_bias=bias):
            assert passes.current == RunningPass(route=route, token_bias=bias)
            with passes.running(route=None):
                assert passes.current == RunningPass(token_bias=bias)
            assert passes.current.route is route
        assert passes.current == RunningPass(route=route)
    assert passes.current == OUTSIDE


def test_an_error_undoes_the_changes():
    passes = Passes()
    with passes.running(route=Route(["a"])):
        outer = passes.current
        with pytest.raises(ZeroDivisionError), passes.running(token_bias=torch.zeros(1)):
            _ = 1 / 0
        assert passes.current is outer
    assert passes.current == OUTSIDE


def test_a_forward_pass_that_fails_leaves_no_changes():
    model, layers = prompted()
    before = logits(model)

    def fail(layer, prefix, batch_size):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        logits(model, edit_prefix=fail)
    assert passes_of(model).current == OUTSIDE
    assert torch.equal(logits(model), before)


def test_what_is_unknown_is_refused_and_changes_nothing():
    passes = Passes()
    with pytest.raises(TypeError, match="nonesuch"), passes.running(nonesuch=1):
        pass
    assert passes.current == OUTSIDE


def test_every_thread_has_its_own():
    passes, seen = Passes(), {}
    inside, checked = threading.Event(), threading.Event()

    def other():
        seen["before"] = passes.current
        with passes.running(route=Route(["b"])):
            inside.set()
            checked.wait(30)
            seen["inside"] = passes.current.route.adapters

    with passes.running(route=Route(["a"])):
        thread = threading.Thread(target=other)
        thread.start()
        assert inside.wait(30)
        assert passes.current.route.adapters == ["a"]
        checked.set()
        thread.join()
    assert seen == {"before": OUTSIDE, "inside": ["b"]}
    assert passes.current == OUTSIDE


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_all_layers_of_a_model_share_their_passes_and_a_copy_has_its_own(copy_of):
    model, layers = prompted()
    with passes_of(model).running(route=Route(["default"])):
        copied = copy_of(model)
        assert passes_of(copied).current == OUTSIDE
    for each in (model, copied):
        shared = {id(layer.passes) for layer in PromptedAdapter.find(each).layers}
        assert shared == {id(passes_of(each))} == {id(each.base_model.passes)}
    assert passes_of(copied) is not passes_of(model)


@pytest.mark.parametrize("other_is", ["a copy", "another", "called through its backbone"])
def test_another_model_inside_a_pass_is_not_part_of_it(other_is):
    """For example a teacher, called by a hook of the student."""
    model, layers = prompted()
    other = copy.deepcopy(model) if other_is == "a copy" else prompted()[0]
    run = other.get_base_model() if other_is == "called through its backbone" else other
    expected, alone = run(images()).logits, model(images(), adapter_names=["__base__"] * 3).logits
    got = []
    layers[1].register_forward_pre_hook(lambda *args: got.append(run(images()).logits))
    mixed = model(images(), adapter_names=["__base__"] * 3).logits
    scaled = logits(model, edit_prefix=lambda layer, prefix, batch_size: prefix._replace(keys=9 * prefix.keys))
    assert len(got) == 2 and torch.equal(got[0], expected) and torch.equal(got[1], expected)
    assert torch.equal(mixed, alone) and not torch.allclose(scaled, logits(model))


def test_a_call_inside_a_routed_one_goes_through_the_active_adapter():
    model, layers = prompted()
    expected, got = logits(model), []

    def call_again(*args):
        handle.remove()
        got.append(logits(model))

    handle = layers[1].register_forward_pre_hook(call_again)
    model(images(), adapter_names=["__base__"] * 3)
    assert torch.equal(got[0], expected)


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
