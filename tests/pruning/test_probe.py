from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from e2vpt_peft.adapter import PromptedAdapter
from e2vpt_peft.pruning import prune_prompts
from e2vpt_peft.pruning.probe import Probe, as_inputs, undisturbed
from e2vpt_peft.running_pass import RunningPass, passes_of

from ..peft_contract.common import assert_unchanged, snapshot
from ..support.models import images, tiny_vit
from ..support.prompted import with_prompts
from ..support.reference import random_prompts
from .common import LABELS, adapted, data, prompted

both_depths = pytest.mark.parametrize("shallow", [False, True])


def probe_of(model, batch=None):
    return Probe(PromptedAdapter.find(model), batch or data(1)[0])


@both_depths
def test_the_loss_is_that_of_the_model_and_with_other_prompts_that_of_a_model_with_those(shallow):
    model, (batch,) = prompted(shallow, torch.float32), data(1)
    probe = probe_of(model, batch)
    assert len(probe.layers) == len(probe.prompts) == (1 if shallow else 3)
    before = snapshot(model)
    with torch.no_grad():
        assert torch.equal(probe.loss(), model(**batch).loss)
        prompts = random_prompts(tiny_vit(), 4, 2, shallow=shallow)
        prompts.visual = torch.randn(len(probe.layers), 7, 32)
        expected = with_prompts(tiny_vit(), prompts, num_segments=8)(**batch)
        torch.testing.assert_close(probe.loss(list(prompts.visual)), expected.loss)
        torch.testing.assert_close(probe.output(list(prompts.visual)).logits, expected.logits)
    assert_unchanged(model, before)
    assert passes_of(model).current == RunningPass()


@both_depths
def test_prompts_are_those_that_are_kept_without_a_graph_of_their_own(shallow):
    model = prompted(shallow, torch.float32)
    mask = torch.ones(4, 8, dtype=torch.bool)
    mask[2, :3] = False
    prune_prompts(model, segment_mask=mask)
    prune_prompts(model, token_mask=[True, False, True, True])
    probe = probe_of(model)
    assert torch.equal(probe.kept, mask[[0, 2, 3]])
    for layer, prompts in zip(probe.layers, probe.prompts):
        assert torch.equal(prompts, layer.full_prompts("default")[[0, 2, 3]])
        assert not prompts.requires_grad
    assert (probe.prompts[0][1].view(4, 8)[:, :3] == 0).all()


def test_losses_have_gradients_and_values_are_numbers_in_float64():
    probe = probe_of(prompted(dtype=torch.float32))
    leaves = [prompts.clone().requires_grad_() for prompts in probe.prompts]
    gradients = torch.autograd.grad(probe.loss(leaves), leaves)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    value = probe.value(leaves)
    assert value.dtype == torch.float64 and value.shape == () and not value.requires_grad
    torch.testing.assert_close(value.float(), probe.loss().detach())


def test_a_model_that_returns_no_loss_is_refused_in_words():
    probe = probe_of(prompted(dtype=torch.float32), {"pixel_values": images(4)})
    with pytest.raises(ValueError, match=r"no loss for a batch of \['pixel_values'\]: batches need labels"):
        probe.loss()


def test_a_loss_may_stand_in_a_dictionary_or_an_object():
    class Output:
        loss = torch.tensor(2.0)

    probe = probe_of(prompted(dtype=torch.float32))
    assert probe.loss_in({"loss": torch.tensor(1.0)}) == 1
    assert probe.loss_in(Output()) == 2
    for output in ({"logits": torch.ones(1)}, (torch.ones(1),)):
        with pytest.raises(ValueError, match="no loss"):
            probe.loss_in(output)


class TestUndisturbed:
    def states(self, model):
        return (
            [module.training for module in model.modules()],
            {name: parameter.requires_grad for name, parameter in model.named_parameters()},
            model.base_model.model.vit.layers[0].attention.active_adapters,
            random.getstate(),
            np.random.get_state()[1].tolist(),
            torch.get_rng_state().tolist(),
        )

    def model(self):
        """Of two adapters the other one is active, in training, and a part is frozen."""
        model = adapted()
        model.add_adapter("other", model.peft_config["default"])
        model.set_adapter("other")
        model.train()
        model.base_model.model.vit.layers[1].eval()
        model.base_model.model.vit.layers[2].attention.e2vpt_kv_prompts["other"].requires_grad_(False)
        return model

    @pytest.mark.parametrize("error", [False, True])
    def test_everything_is_as_it_was_afterwards_even_after_an_error(self, error):
        model = self.model()
        adapter, before = PromptedAdapter.find(model, "default"), self.states(model)
        try:
            with torch.no_grad(), undisturbed(adapter):
                assert not any(module.training for module in model.modules())
                assert torch.is_grad_enabled()
                assert adapter.layers[0].active_adapters == ["default"]
                random.random(), np.random.rand(), torch.rand(3)
                if error:
                    raise ZeroDivisionError
        except ZeroDivisionError:
            pass
        assert self.states(model) == before


class TestInputs:
    def test_a_dictionary_goes_in_as_it_is(self):
        batch = {**data(1)[0], "name": "flowers"}
        inputs = as_inputs(tiny_vit(), batch)
        assert inputs.keys() == batch.keys() and inputs["name"] == "flowers"
        assert torch.equal(inputs["pixel_values"], batch["pixel_values"])

    def test_a_pair_is_the_main_input_of_the_model_and_labels(self):
        model = tiny_vit()
        assert as_inputs(model, (images(4), LABELS)).keys() == {"pixel_values", "labels"}
        model.main_input_name = "input_values"
        assert as_inputs(model, [images(4), LABELS]).keys() == {"input_values", "labels"}
        assert as_inputs(nn.Linear(2, 2), (images(4), LABELS)).keys() == {"pixel_values", "labels"}

    def test_tensors_go_to_the_device_of_the_model(self):
        inputs = as_inputs(nn.Linear(2, 2, device="meta"), {"x": torch.ones(2), "name": "flowers"})
        assert inputs["x"].is_meta and inputs["name"] == "flowers"

    @pytest.mark.parametrize("batch", [torch.ones(2), (torch.ones(2),), [1, 2, 3], "ab"])
    def test_anything_else_is_refused(self, batch):
        with pytest.raises(ValueError, match=f"a pair .inputs, labels., not {type(batch).__name__}"):
            as_inputs(tiny_vit(), batch)
