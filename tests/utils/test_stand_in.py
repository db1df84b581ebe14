"""An adapted attention is taken for the attention itself."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from e2vpt_peft import E2VPTConfig, E2VPTLayer

from ..support.adapted import adapt, first_layer
from ..support.models import images, tiny_vit


def test_the_wrapper_answers_for_its_attention():
    layer = first_layer(get_peft_model(tiny_vit(), E2VPTConfig()))
    assert isinstance(layer, BaseTunerLayer)
    assert layer.num_attention_heads == 4
    assert layer.q_proj is layer.base_layer.q_proj
    with pytest.raises(AttributeError):
        _ = layer.no_such_thing


def test_what_is_set_on_the_adapted_module_reaches_the_attention():
    model = adapt(tiny_vit())
    attention = model.base_model.model.vit.layers[0].attention
    expected = model(images()).logits
    attention.scaling = 0.01
    assert attention.base_layer.scaling == attention.scaling == 0.01
    assert not torch.allclose(model(images()).logits, expected)

    attention.k_proj, former = nn.Linear(32, 32), attention.k_proj
    assert attention.base_layer.k_proj is attention.k_proj is not former
    attention.register_buffer("seen", torch.zeros(1))
    attention.note = "mine"
    assert {"seen"} == set(attention.base_layer._buffers) and attention.base_layer.note == "mine"
    del attention.note, attention.seen
    assert not hasattr(attention.base_layer, "note") and not hasattr(attention, "seen")


def test_what_is_the_wrappers_own_stays_there():
    attention = first_layer(adapt(tiny_vit()))
    attention.train()
    attention.merged_adapters = ["x"]
    attention._noted_by_a_framework = 1
    assert not {"merged_adapters", "_noted_by_a_framework"} & set(vars(attention.base_layer))
    attention.__class__ = type("Sharded", (type(attention),), {})
    assert isinstance(attention, E2VPTLayer) and type(attention.base_layer).__name__ == "ViTAttention"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_writes_through_to_its_own_attention(copied):
    first = adapt(tiny_vit())
    second = copied(first)
    first_layer(second).scaling = 0.01
    assert first_layer(first).scaling != 0.01 == first_layer(second).base_layer.scaling


def test_attributes_are_the_wrappers_own_or_those_of_the_attention() -> None:
    layer = first_layer(adapt(tiny_vit()))
    assert layer.q_proj is layer.base_layer.q_proj
    assert layer.e2vpt_visual_prompts is layer._modules["e2vpt_visual_prompts"]
    assert not hasattr(layer.base_layer, "e2vpt_visual_prompts")
    layer._parameters["gate"] = nn.Parameter(torch.ones(1))
    layer._buffers["count"] = torch.zeros(1)
    assert layer.gate is layer._parameters["gate"] and layer.count is layer._buffers["count"]
    for name in ("missing", "_private"):
        with pytest.raises(AttributeError, match=name):
            getattr(layer, name)
