"""What PEFT, and whoever builds on it, expects of every tuner and of its layers."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_base_model_state_dict, get_peft_model, get_peft_model_state_dict
from peft.utils import NoMatchingPeftModuleError
from torch import nn

from e2vpt_peft import E2VPTLayer, E2VPTModel

from ..support.adapted import adapt, inputs, make
from ..support.models import prompt_parameters, tiny_vit
from .common import adapted, assert_unchanged, edit_config, layers_of, logits, small_config, snapshot


@pytest.mark.parametrize("name", ["vit", "swin", "bert"])
def test_layers_say_how_wide_the_states_are_that_go_in_and_come_out(name: str) -> None:
    model = adapt(make(name))
    seen = []

    def compare(layer: Any, args: tuple[torch.Tensor], kwargs: Any, output: Any) -> None:
        seen.append((layer.in_features, layer.out_features) == (args[0].shape[-1], output[0].shape[-1]))

    for layer in layers_of(model):
        layer.register_forward_hook(compare, with_kwargs=True)
    model(**inputs(name))
    assert len(seen) == len(layers_of(model)) and all(seen)


def test_each_target_is_listed_once() -> None:
    model = adapted(layers_to_transform=[1])
    model.add_adapter("other", small_config())
    assert model.base_model.targeted_module_names == [f"vit.layers.{index}.attention" for index in (1, 0, 2)]


def test_a_second_adapter_without_targets_is_refused() -> None:
    model = adapted()
    before = snapshot(model)
    with pytest.raises(NoMatchingPeftModuleError, match="not found in the base model"):
        model.add_adapter("other", small_config(target_modules=["nowhere"], modules_to_save=None))
    assert_unchanged(model, before)


@pytest.mark.parametrize("cls", [E2VPTModel, E2VPTLayer])
def test_an_attribute_may_be_asked_for_before_the_module_is_made(cls: type[nn.Module], monkeypatch: Any) -> None:
    """As DeepSpeed does, for any `__init__`: what is read through to another module must not look for it for ever."""
    make = cls.__init__

    @functools.wraps(make)
    def asked(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        assert not hasattr(self, "nonesuch")
        make(self, *args, **kwargs)

    monkeypatch.setattr(cls, "__init__", asked)
    get_peft_model(tiny_vit(), small_config())


class TestModulesNamedLikePrompts:
    """The prefix of prompts in the name of a module of the backbone."""

    @staticmethod
    def backbone() -> nn.Module:
        model = tiny_vit()
        model.e2vpt_head = nn.Linear(2, 2)
        return model

    def test_such_a_module_is_neither_trained_nor_saved(self) -> None:
        model = get_peft_model(self.backbone(), small_config())
        assert not any(parameter.requires_grad for parameter in model.base_model.model.e2vpt_head.parameters())
        assert not [name for name in get_peft_model_state_dict(model) if "e2vpt_head" in name]

    def test_unless_it_is_one_of_the_modules_to_save(self, tmp_path: Path) -> None:
        model = get_peft_model(self.backbone(), small_config(modules_to_save=["e2vpt_head"]))
        with torch.no_grad():
            model.base_model.model.e2vpt_head.modules_to_save["default"].weight.fill_(9)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(self.backbone(), tmp_path)
        assert (loaded.base_model.model.e2vpt_head.modules_to_save["default"].weight == 9).all()


def test_the_weights_of_the_backbone_have_their_own_names() -> None:
    model, backbone = adapted(), tiny_vit().state_dict()
    found = get_base_model_state_dict(model)
    assert found.keys() == backbone.keys()
    assert all(torch.equal(found[name], backbone[name]) for name in backbone)


def test_another_adapter_leaves_what_the_user_froze(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    for name, parameter in prompt_parameters(model).items():
        parameter.requires_grad_("kv" not in name)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert set(before.values()) == {True, False}
    model.load_adapter(tmp_path, "loaded")
    model.add_adapter("added", small_config())
    after = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {name: after[name] for name in before} == before
    assert not any(after[name] for name in after.keys() - before.keys())


class TestFieldsOfANewerVersion:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        adapted().save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    @pytest.mark.parametrize("value", [None, False, "", [], {}, 0, 0.0], ids=json.dumps)
    def test_that_are_not_in_use_are_left_out_with_the_warning_of_peft(self, value: Any, folder: Path) -> None:
        expected = logits(PeftModel.from_pretrained(tiny_vit(), folder))
        edit_config(folder, from_the_future=value)
        with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['from_the_future'\]"):
            loaded = PeftModel.from_pretrained(tiny_vit(), folder)
        assert torch.equal(logits(loaded), expected)

    @pytest.mark.parametrize("value", [True, "soft", [0], {"a": None}, 1, -0.5], ids=json.dumps)
    def test_that_say_something_are_refused(self, value: Any, folder: Path) -> None:
        edit_config(folder, unused=None, from_the_future=value)
        for target, load in (
            (model := adapted(), lambda: model.load_adapter(folder, "other")),
            (backbone := tiny_vit(), lambda: PeftModel.from_pretrained(backbone, folder)),
        ):
            before = snapshot(target)
            with pytest.raises(ValueError, match="newer version.*Upgrade both") as raised:
                load()
            assert f"from_the_future={value!r}" in str(raised.value) and "unused" not in str(raised.value)
            assert_unchanged(target, before)
