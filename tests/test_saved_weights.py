from __future__ import annotations

from typing import Any

import pytest
import torch

from e2vpt_peft.prompt_shapes import KV_PROMPTS, VISUAL_PROMPTS
from e2vpt_peft.saved_weights import (
    ExpectedWeights,
    check_finite,
    check_layers,
    check_names,
    check_segment_mask,
    check_shape,
    check_type,
)


@pytest.mark.parametrize(
    ("names", "modules_to_save", "words"),
    [
        ([], None, "has no prompts, but nothing at all"),
        (["a", "b", "c", "d", "e"], None, "has no prompts, but 'a', 'b', 'c' and 2 more"),
        (["0.e2vpt_kv_prompts", "head.bias"], None, r"has 'head.bias', which .* modules_to_save=\[\]"),
        (["0.e2vpt_kv_prompts", "head.bias"], ["classifier"], r"has 'head.bias', .* modules_to_save=\['classifier'\]"),
        (["0.e2vpt_kv_prompts", "head.original_module.bias"], ["head"], "has 'head.original_module.bias', which"),
        (["0.e2vpt_kv_prompts", "base_layer.head.bias"], ["head"], "has 'base_layer.head.bias', which"),
    ],
)
def test_names_that_are_not_an_adapters_are_refused(names: list[str], modules_to_save: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"^here {words}"):
        check_names(names, modules_to_save, "here")


def test_names_of_prompts_and_of_the_modules_to_save_pass() -> None:
    check_names(["layers.0.e2vpt_visual_prompts"], None, "here")
    check_names(["layers.0.e2vpt_visual_prompts", "model.head.bias"], ["head"], "here")


def test_values_that_are_not_finite_are_counted() -> None:
    tensor = torch.tensor([1.0, float("nan"), float("inf")])
    with pytest.raises(ValueError, match="^here: 2 of 3 values of 'prompts' are NaN or infinite"):
        check_finite("prompts", tensor, "here")
    check_finite("prompts", tensor[:1], "here")
    check_finite("prompts", torch.empty(3, device="meta"), "here")
    check_finite("mask", torch.tensor([1.0, float("inf")]), "here", infinite=False)


@pytest.mark.parametrize("name", ["base_model.model.model.bias", "base_model.model.vit.modelling.bias", "model.bias"])
def test_peft_s_own_prefix_is_no_part_of_a_module_to_save(name: str) -> None:
    names = ["0.e2vpt_kv_prompts", name]
    if name.endswith("model.bias"):
        check_names(names, ["model"], "here")
    else:
        with pytest.raises(ValueError, match="^here has 'base_model.model.vit.modelling.bias', which"):
            check_names(names, ["model"], "here")


class TestLayers:
    def names(self, *layers: int, kinds: tuple[str, ...] = (VISUAL_PROMPTS, KV_PROMPTS)) -> list[str]:
        return [f"layers.{layer}.{kind}" for layer in layers for kind in kinds]

    @property
    def expected(self) -> ExpectedWeights:
        return ExpectedWeights([{VISUAL_PROMPTS: (2, 32), KV_PROMPTS: (4, 3, 8)}], 3, [], in_all_layers=True)

    def test_all_of_them_pass(self) -> None:
        check_layers(self.names(0, 1, 2), self.expected, "here")
        check_layers(self.names(0, 2), self.expected._replace(in_all_layers=False), "here")
        shallow = self.names(0) + self.names(1, 2, kinds=(KV_PROMPTS,))
        check_layers(shallow, self.expected._replace(is_shallow=True), "here")

    @pytest.mark.parametrize("layers", [(0, 1), (0,), (0, 1, 2, 3)])
    def test_fewer_or_more_than_the_backbone_has_are_refused(self, layers: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=f"for {len(layers)} layers.* 3"):
            check_layers(self.names(*layers), self.expected, "here")

    def test_a_layer_that_lacks_one_kind_is_named(self) -> None:
        names = self.names(0, 2) + self.names(1, kinds=(VISUAL_PROMPTS,))
        for expected in (self.expected, self.expected._replace(in_all_layers=False)):
            with pytest.raises(ValueError, match="e2vpt_kv_prompts for 2 layers, .* 3. It has none for 'layers.1'"):
                check_layers(names, expected, "here")

    def test_shallow_visual_prompts_are_in_one_layer(self) -> None:
        with pytest.raises(ValueError, match="e2vpt_visual_prompts for 3 layers, .* should be 1"):
            check_layers(self.names(0, 1, 2), self.expected._replace(is_shallow=True), "here")


def test_prompts_that_are_not_known_are_those_of_a_newer_version() -> None:
    with pytest.raises(ValueError, match="here has '0.e2vpt_nonsense', which this version .* newer one"):
        check_shape("0.e2vpt_nonsense", (1,), [{}], "here")
    check_shape("0.weight", (1,), [{}], "here")


@pytest.mark.parametrize("dtype", ["I64", "BOOL", "U8", "C64", "F4"])
def test_types_that_prompts_cannot_have_are_refused(dtype: str) -> None:
    with pytest.raises(ValueError, match=f"'0.e2vpt_kv_prompts' has type {dtype}"):
        check_type("0.e2vpt_kv_prompts", dtype, "here")
    check_type("0.e2vpt_kv_prompts", "F8_E4M3", "here")
    check_type("0.e2vpt_segment_mask", "U8", "here")


def test_another_mask_of_as_many_segments_is_refused_and_an_average_of_equal_ones_is_not() -> None:
    mask = [[True, False], [True, True]]
    check_segment_mask(torch.tensor(mask).byte(), mask, "here")
    check_segment_mask(torch.tensor(mask) * 0.999, mask, "here")
    for other in ([[False, True], [True, True]], [[True, False]], [[True] * 2] * 2):
        with pytest.raises(ValueError, match="here has visual prompts of other segments"):
            check_segment_mask(torch.tensor(other).byte(), mask, "here")
    with pytest.raises(ValueError, match="other segments"):
        check_segment_mask(torch.tensor(mask).byte(), None, "here")
