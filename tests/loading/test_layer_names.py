from __future__ import annotations

import pytest

from e2vpt_peft.loading.layer_names import match_layers

PRESENT = ["vit.layers.0.attention", "vit.layers.1.attention"]


def renamed(pattern: str) -> list[str]:
    return [pattern.format(name) for name in PRESENT]


@pytest.mark.parametrize(
    "saved",
    [
        PRESENT,
        ["layers.0.attention", "layers.1.attention"],
        renamed("backbone.{}"),
        renamed("module.{}"),
        renamed("base_model.model.{}"),
        renamed("base_model.model._orig_mod.base_model.model.module.{}"),
        renamed("module.encoder.{}"),
        ["vit._fsdp_wrapped_module.layers.0._orig_mod.attention", "vit.layers.1._orig_mod.attention"],
    ],
    ids=str,
)
def test_every_layer_is_found_by_one_change_of_names(saved: list[str]) -> None:
    assert match_layers(saved, PRESENT, {}) == dict(zip(saved, PRESENT))


def test_wrappers_may_be_in_the_model() -> None:
    wrapped = renamed("_orig_mod.{}")
    assert match_layers(PRESENT, wrapped, {}) == dict(zip(PRESENT, wrapped))


def test_former_names_are_known_behind_wrappers_as_well() -> None:
    former = {"vit.encoder.layer.0": PRESENT[0], "vit.encoder.layer.1": PRESENT[1]}
    assert match_layers(former, PRESENT, former) == former
    saved = [f"module.{name}" for name in former]
    assert match_layers(saved, PRESENT, former) == dict(zip(saved, PRESENT))


@pytest.mark.parametrize(
    "saved",
    [
        [],
        ["layers.0.attention"],  # of one layer, when there are two
        ["layers.0.attention", "layers.2.attention"],
        ["a.layers.0.attention", "b.layers.1.attention"],  # each in another way
        ["0.attention", "layers.1.attention"],
        ["text.layers.0.attention", "text.layers.0.attention", "vit.layers.1.attention"],
    ],
    ids=str,
)
def test_names_are_left_alone_where_no_one_change_finds_all(saved: list[str]) -> None:
    assert match_layers(saved, PRESENT, {}) == {name: name for name in saved}
