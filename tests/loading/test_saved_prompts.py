from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict

from e2vpt_peft.loading.saved_prompts import (
    check_prompts,
    check_values,
    prompts_in,
    prompts_to_come,
)

from ..peft_contract.common import KINDS, adapted, layers_of, small_config


def backbone_of(model: PeftModel) -> Any:
    return model.get_base_model()


def shapes(model: PeftModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in get_peft_model_state_dict(model).items()}


@pytest.mark.parametrize("kind", [*KINDS.values(), {"segment_mask": [[True] * 12 + [False] * 4] * 2}], ids=str)
def test_prompts_to_come_are_those_that_are_there_afterwards_and_that_are_saved(kind: dict) -> None:
    model = adapted(modules_to_save=None, **kind)
    there = prompts_in(backbone_of(model), "default")
    config = model.peft_config["default"]
    names = ["vit.layers.0.attention", "vit.layers.1.attention", "vit.layers.2.attention"]
    site = layers_of(model)[0].site
    to_come = prompts_to_come(config, backbone_of(model), dict.fromkeys(names, site))
    assert there.shapes == to_come.shapes
    assert {f"base_model.model.{name}" for name in there.shapes} == set(shapes(model))
    named = check_prompts(shapes(model), there, "here")
    assert named == {name: name for name in shapes(model)}


class TestPrompts:
    def check(self, saved: dict[str, Any], **config: Any) -> dict[str, str]:
        return check_prompts(saved, prompts_in(backbone_of(adapted(**config)), "default"), "here")

    def test_all_sizes_that_differ_are_named_once(self) -> None:
        wrong = {"visual": (2, 64), "kv": (8, 3, 8)}
        saved = {name: wrong["visual" if "visual" in name else "kv"] for name in shapes(adapted())}
        saved = {name: shape for name, shape in saved.items() if "e2vpt" in name}
        with pytest.raises(ValueError, match=r"with hidden size 64 \(this model: 32\), heads 8 \(this model: 4\)\."):
            self.check(saved)

    def test_layers_that_the_model_does_not_have_tell_how_many_there_were(self) -> None:
        saved = shapes(adapted())
        more = {name.replace("layers.2", "layers.3"): shape for name, shape in saved.items()}
        with pytest.raises(ValueError, match=r"number of layers 4 \(this model: 3\)"):
            self.check({**saved, **more})
        with pytest.raises(ValueError, match="and 1 more, for which there is no place"):
            self.check(saved, layers_to_transform=[0])  # they are there, and not adapted

    def test_two_tensors_for_one_place_are_refused(self) -> None:
        saved = shapes(adapted(modules_to_save=None))
        doubled = {**saved, **{name.removeprefix("base_model.model."): shape for name, shape in saved.items()}}
        with pytest.raises(ValueError, match="here has other prompts than the adapter has"):
            self.check(doubled)


def test_values_that_are_not_finite_and_numbers_that_are_no_floats_are_refused() -> None:
    config = small_config()
    check_values({"a.e2vpt_kv_prompts": torch.ones(3)}, config)
    with pytest.raises(
        ValueError, match="The state dict of the adapter: 3 of 3 values of 'a.e2vpt_kv_prompts' are NaN"
    ):
        check_values({"a.e2vpt_kv_prompts": torch.full((3,), float("nan"))}, config)
    for dtype in (torch.int64, torch.bool, torch.complex64):
        with pytest.raises(ValueError, match=f"'a.e2vpt_kv_prompts' has type {dtype}"):
            check_values({"a.e2vpt_kv_prompts": torch.ones(3, dtype=dtype)}, config)
