from __future__ import annotations

import pytest
import torch

from e2vpt_peft.utils.attention_weights import attention_weights

from ..support.adapted import adapt
from ..support.models import images, tiny_vit


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_they_are_those_of_evaluation_and_the_model_is_left_as_it_was(implementation: str) -> None:
    backbone = tiny_vit(attn_implementation=implementation, attention_probs_dropout_prob=0.5)
    model = adapt(backbone, prompt_dropout=0.5).train()
    weights = attention_weights(model, backbone, {"pixel_values": images(2)})
    again = attention_weights(model, backbone, {"pixel_values": images(2)})
    assert [tuple(layer.shape) for layer in weights] == [(2, 4, 17, 5 + 17)] * 3
    assert all(torch.equal(one, other) and not one.requires_grad for one, other in zip(weights, again))
    torch.testing.assert_close(weights[0].sum(-1), torch.ones(2, 4, 17))
    assert backbone.config._attn_implementation == implementation
    assert all(module.training for module in model.modules())


def test_the_model_is_left_as_it_was_by_a_pass_that_fails() -> None:
    backbone = tiny_vit(attn_implementation="sdpa").train()
    with pytest.raises(ValueError, match="size"):
        attention_weights(backbone, backbone, {"pixel_values": images(2, size=20)})
    assert backbone.config._attn_implementation == "sdpa"
    assert all(module.training for module in backbone.modules())
