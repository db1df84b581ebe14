from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from e2vpt_peft import prune_prompts
from e2vpt_peft.adapter import PromptedAdapter
from e2vpt_peft.trainer.fingerprints import describe, describe_backbone, fingerprint

from .toy import accuracy, adapted


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.ones(3), torch.tensor([1.0, 1.0, 1.0000001])),
        (torch.ones(3), torch.ones(3, dtype=torch.float64)),
        (torch.ones(2, 3), torch.ones(3, 2)),
        (torch.ones(3, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.bfloat16)),
        (torch.tensor(1j), torch.tensor(2j)),
        (np.zeros(3), np.array([0.0, -0.0, 0.0])),
        (Image.new("RGB", (2, 2)), Image.new("RGB", (2, 2), "red")),
        ({"a": 1, "b": [2]}, {"a": 1, "b": [3]}),
        ({"a": 1}, {"b": 1}),
        ("1", 1),
        ([[1], 2], [1, [2, 3]]),
    ],
)
def test_what_differs_has_another_fingerprint(one: Any, other: Any) -> None:
    assert fingerprint(one) == fingerprint(one) != fingerprint(other)


def test_an_object_of_no_data_has_that_of_its_type() -> None:
    assert fingerprint(object()) == fingerprint(object())


def test_a_function_is_known_by_its_name_and_code() -> None:
    def make(scale: int) -> Any:
        return lambda prediction: {"accuracy": scale} if prediction in {"a", "b"} else None

    other = lambda prediction: {"accuracy": 1.0}  # noqa: E731
    assert describe(make(1)) == describe(make(1)) != describe(other)
    assert describe(accuracy).startswith("accuracy ")
    assert describe(partial(accuracy, 1)) != describe(partial(accuracy, 2))
    assert describe((torch.optim.SGD, {"lr": 0.1})) == ["SGD", {"lr": 0.1}]
    assert describe(None) is None


def backbone(model: Any) -> dict[str, Any]:
    return describe_backbone(PromptedAdapter.find(model))


def test_a_backbone_stays_the_same_while_its_adapter_changes() -> None:
    model = adapted()
    before = backbone(model)
    assert backbone(adapted(seed=5)) == before
    segment_mask = [[True] * 4] * 3 + [[True, False, True, True]]
    prune_prompts(model, token_mask=[True, False, True, True], segment_mask=segment_mask)
    wrapper = model.base_model.model.classifier
    with torch.no_grad():
        for module in (wrapper.original_module, wrapper.modules_to_save["default"]):
            module.weight.add_(1)
    assert backbone(model) == before


def change_weight(model: Any) -> None:
    weight = next(p for name, p in model.named_parameters() if "fc1" in name or "dense" in name or "mlp" in name)
    weight.data.view(torch.int32)[0] ^= 1


def change_dropout(model: Any) -> None:
    next(m for m in model.base_model.model.modules() if type(m) is torch.nn.Dropout).p = 0.3


def change_config(model: Any) -> None:
    model.base_model.model.config.attention_probs_dropout_prob = 0.4


def change_precision(model: Any) -> None:
    model.to(torch.bfloat16)


def change_attention(model: Any) -> None:
    model.set_attn_implementation("eager")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (change_weight, "weights"),
        (change_dropout, "modules"),
        (change_config, "config"),
        (change_precision, "weights"),
        (change_attention, "attention"),
    ],
)
def test_another_backbone_is_told_apart(change: Any, field: str) -> None:
    model = adapted()
    before = backbone(model)
    change(model)
    after = backbone(model)
    assert after[field] != before[field]
