from __future__ import annotations

import pytest
import torch

from e2vpt_peft.loading.saved_heads import (
    check_head_sizes,
    check_nothing_overwritten,
    refuse_other_sizes_before_loading,
)

from ..peft_contract.common import adapted


def test_what_would_overwrite_the_model_or_another_adapter_is_refused() -> None:
    model = adapted()
    own = [f"base_model.model.classifier.modules_to_save.default.{part}" for part in ("weight", "bias")]
    check_nothing_overwritten(
        model, "default", ["base_model.model.vit.layers.0.attention.e2vpt_kv_prompts", *own, "nowhere"]
    )
    for name in ("base_model.model.vit.layernorm.weight", "vit.layernorm.weight", own[0]):
        with pytest.raises(ValueError, match=f"has '.*{name}' .1 such tensors., .* overwrite the model"):
            check_nothing_overwritten(model, "other", [name])


def test_sizes_are_compared_where_both_have_the_weight() -> None:
    check_head_sizes({"a": (1,), "b": (2,)}, {"a": (1,), "c": (3,)}, "here")
    with pytest.raises(
        ValueError, match=r"size mismatch for a: here has shape \(1,\), and this model \(2,\) \(1 such"
    ):
        check_head_sizes({"a": (1,)}, {"a": (2,)}, "here")


def test_the_next_state_dict_is_refused_whole_and_the_one_after_that_is_none_of_its_business() -> None:
    module, given_up = torch.nn.Linear(2, 2), []
    before = {name: value.clone() for name, value in module.state_dict().items()}
    refuse_other_sizes_before_loading(module, lambda: given_up.append(True))
    wrong = {"weight": torch.ones(2, 2), "bias": torch.ones(3)}
    with pytest.raises(ValueError, match="size mismatch for bias"):
        module.load_state_dict(wrong)
    assert given_up == [True]
    assert all(torch.equal(module.state_dict()[name], value) for name, value in before.items())
    with pytest.raises(RuntimeError, match="size mismatch for bias"):
        module.load_state_dict(wrong)
    refuse_other_sizes_before_loading(module, lambda: given_up.append(True))
    module.load_state_dict({"weight": torch.ones(2, 2), "bias": torch.ones(2)})
    assert given_up == [True] and (module.bias == 1).all()
