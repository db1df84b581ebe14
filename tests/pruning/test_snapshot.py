from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from e2vpt_peft import prune_prompts, rewind_prompts
from e2vpt_peft.adapter import PromptedAdapter
from e2vpt_peft.pruning import AdapterSnapshot, InitialValues
from e2vpt_peft.pruning.snapshot import copy_trained, trained_tensors

from ..support.models import images
from .common import adapted, both_depths, scores


def logits(model):
    with torch.no_grad():
        return model(pixel_values=images()).logits


@torch.no_grad()
def train(model):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter))


def pruned(model):
    prune_prompts(model, scores(), token_rate=0.5, segment_rate=0.5)
    return PromptedAdapter.find(model)


def with_batch_norm():
    """A head that has buffers."""
    model = adapted()
    head = model.base_model.model.classifier.modules_to_save
    head["default"] = nn.Sequential(nn.BatchNorm1d(32), nn.Linear(32, 5)).eval()
    return model


@both_depths
def test_an_adapter_is_put_back_with_masks_and_values(depth):
    model = adapted(depth)
    adapter, before = PromptedAdapter.find(model), logits(model)
    whole = AdapterSnapshot.of(adapter)
    pruned(model)
    train(model)
    between, left = logits(model), AdapterSnapshot.of(adapter)
    whole.restore(adapter)
    assert torch.equal(logits(model), before) and adapter.masks == whole.masks
    left.restore(adapter)
    assert torch.equal(logits(model), between) and adapter.masks == left.masks != whole.masks


def test_it_is_a_copy_that_training_does_not_change():
    adapter = PromptedAdapter.find(adapted())
    taken = AdapterSnapshot.of(adapter)
    values = {name: tensor.clone() for name, tensor in taken.values.items()}
    train(adapter.model)
    taken.restore(adapter)
    train(adapter.model)
    assert all(torch.equal(taken.values[name], value) for name, value in values.items())
    assert not any(tensor.requires_grad for tensor in taken.values.values())


def test_it_has_what_is_trained_and_the_buffers_of_modules_to_save_and_nothing_else():
    model = with_batch_norm()
    adapter = PromptedAdapter.find(model)
    names = [name for name, _ in trained_tensors(adapter)]
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 6 + 4
    buffers = ["running_mean", "running_var", "num_batches_tracked"]
    assert names == [*trained, *(f"classifier:0.{buffer}" for buffer in buffers)]
    before = logits(model)
    taken = AdapterSnapshot.of(adapter)
    model.base_model.model.classifier.modules_to_save["default"][0].running_mean.add_(1)
    assert not torch.allclose(logits(model), before)
    taken.restore(adapter)
    assert torch.equal(logits(model), before)


@both_depths
def test_it_goes_through_a_file(depth, tmp_path):
    model = adapted(depth)
    adapter = pruned(model)
    before = logits(model)
    save_file(AdapterSnapshot.of(adapter).to_tensors(), tmp_path / "snapshot.safetensors")
    rewind_prompts(model, undo_pruning=True)
    AdapterSnapshot.from_tensors(load_file(tmp_path / "snapshot.safetensors")).restore(adapter)
    assert torch.equal(logits(model), before)


@both_depths
def test_initial_values_are_where_another_model_of_the_adapter_rewinds_to(depth):
    first, second = adapted(depth), adapted(depth, seed=5)
    with torch.no_grad():
        first.base_model.model.classifier.original_module.weight.add_(1)
    initial = InitialValues.of(PromptedAdapter.find(first))
    train(first)  # which changes them no more
    initial.restore(PromptedAdapter.find(second))
    for model in (first, second):
        pruned(model)
        rewind_prompts(model)
    assert torch.equal(logits(first), logits(second))
    train(second)
    rewind_prompts(second)
    assert torch.equal(logits(first), logits(second)), "training changes nothing in what was restored"


def test_an_adapter_that_was_loaded_has_initial_values_of_its_head_alone():
    adapter = PromptedAdapter.find(adapted())
    for layer in adapter.layers:
        del layer.initial_prompts["default"]
    initial = InitialValues.of(adapter)
    assert initial.values.keys() == {"classifier:weight", "classifier:bias"}
    initial.restore(adapter)
    with pytest.raises(ValueError, match="initial values of adapter 'default' are not known"):
        rewind_prompts(adapter.model)


def test_what_was_trained_in_a_copy_of_the_model_comes_back():
    model = with_batch_norm()
    other = copy.deepcopy(model)
    train(other)
    other.base_model.model.classifier.modules_to_save["default"][0].running_mean.add_(1)
    assert not torch.allclose(logits(other), logits(model))
    copy_trained(other, PromptedAdapter.find(model))
    assert torch.equal(logits(model), logits(other))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    train(other)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_copy_with_other_prompts_is_no_copy():
    model = adapted()
    with pytest.raises(RuntimeError, match="size of tensor"):
        copy_trained(pruned(adapted()).model, PromptedAdapter.find(model))
