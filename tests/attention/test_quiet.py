from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from e2vpt_peft.attention.quiet import quietly

from ..support.adapted import adapt
from ..support.models import images, prompt_parameters, tiny_vit

REGISTER = [
    "register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook",
    "register_full_backward_pre_hook",
]  # fmt: skip


@pytest.mark.parametrize("register", REGISTER)
@pytest.mark.parametrize("part", ["attention.k_proj", "attention.v_proj", "layernorm_before"])
def test_hooks_of_the_users_modules_see_the_users_data_only(part, register):
    model, seen = adapt(tiny_vit()), []
    expected = model(images()).logits
    module = model.base_model.model.vit.layers[1].get_submodule(part.replace("attention.", "attention.base_layer."))
    getattr(module, register)(lambda module, first, *rest: seen.append((rest or [first])[-1][0].shape))
    logits = model(images())
    logits.logits.sum().backward()
    torch.testing.assert_close(logits.logits, expected)
    assert len(seen) == 1 and seen[0][-2:] == (17, 32)
    assert all(parameter.grad.abs().max() > 0 for parameter in prompt_parameters(model).values())


@pytest.mark.parametrize("register", REGISTER)
def test_hooks_inside_of_a_projection_with_lora_see_the_users_data_only(register):
    backbone, seen = tiny_vit(), []
    projection = backbone.vit.layers[1].attention.k_proj
    get_peft_model(backbone, LoraConfig(target_modules=["k_proj"], init_lora_weights=False))
    model = adapt(backbone)
    expected = model(images()).logits
    getattr(projection, register)(lambda module, first, *rest: seen.append((rest or [first])[-1]))
    logits = model(images()).logits
    logits.sum().backward()
    torch.testing.assert_close(logits, expected)
    shapes = [(value if isinstance(value, torch.Tensor) else value[0]).shape for value in seen]
    assert shapes == [(3, 17, 32)]


class Doubled(nn.Linear):
    def __call__(self, states):
        return 2 * super().__call__(states)


def test_a_call_of_a_projections_own_counts():
    projection, states = Doubled(4, 2), torch.randn(3, 4)
    torch.testing.assert_close(quietly(projection, states), 2 * projection.forward(states))


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, states):
        return self.norm(states.transpose(1, 2)).transpose(1, 2)


def test_running_statistics_are_those_of_the_users_data():
    module = Normed().train()
    module(torch.randn(2, 5, 4))
    before = copy.deepcopy(module.state_dict())
    states = torch.randn(1, 3, 4)
    assert torch.equal(quietly(module, states), copy.deepcopy(module).eval()(states))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert module.training and module.norm.training


@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.weight_norm, nn.utils.spectral_norm])
def test_weights_that_are_made_anew_have_their_effect(wrap):
    module = wrap(nn.Linear(4, 4)).eval()
    states = torch.randn(2, 4)
    expected = module(states)  # by a pass, in which a hook may make the weight
    assert torch.equal(quietly(module, states), expected)
