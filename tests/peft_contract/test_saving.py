"""Saving and loading adapters, and refusing those that do not fit."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModel,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

from e2vpt_peft import E2VPTConfig, E2VPTModel

from ..support.models import prompt_parameters, tiny_vit
from .common import KINDS, adapted, logits, move_heads, small_config

every_kind = pytest.mark.parametrize("kind", list(KINDS.values()), ids=list(KINDS))
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def saved(tmp_path: Path) -> tuple[PeftModel, Path]:
    model = adapted()
    model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "adapter"


class TestRoundTrip:
    @every_kind
    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_a_saved_adapter_gives_the_same_output(self, kind: dict, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
        model = adapted(layers_to_transform=[1, 2], **kind)
        model.save_pretrained(tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(logits(loaded), logits(model))
        assert all(parameter.device.type == "cpu" for parameter in loaded.parameters())
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        assert not loaded.training

    def test_the_file_has_prompts_and_heads_only(self, saved: tuple[PeftModel, Path]) -> None:
        tensors = load_file(saved[1] / WEIGHTS)
        attention = "base_model.model.vit.layers.{}.attention.e2vpt_{}_prompts"
        prompts = {attention.format(layer, kind) for layer in range(3) for kind in ("visual", "kv")}
        assert set(tensors) == prompts | {"base_model.model.classifier.weight", "base_model.model.classifier.bias"}

    def test_a_trainable_adapter_goes_on_training(self, saved: tuple[PeftModel, Path]) -> None:
        loaded = PeftModel.from_pretrained(tiny_vit(), saved[1], is_trainable=True)
        assert all(parameter.requires_grad for parameter in prompt_parameters(loaded).values())

    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_a_second_adapter_is_loaded_beside_the_first(self, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
        first, second = adapted(), adapted(num_visual_prompts=4)
        second.save_pretrained(tmp_path)
        before = logits(first)
        result = first.load_adapter(tmp_path, "second", low_cpu_mem_usage=low_cpu_mem_usage)
        assert not result.unexpected_keys and not result.missing_keys
        assert torch.equal(logits(first), before)
        assert first.get_model_status().active_adapters == ["default"]
        first.set_adapter("second")
        assert torch.equal(logits(first), logits(second))

    def test_selected_adapters_alone_are_saved(self, tmp_path: Path) -> None:
        model = adapted()
        for name in ("second", "third"):
            model.add_adapter(name, small_config())
        model.save_pretrained(tmp_path, selected_adapters=["default", "third"])
        assert {path.name for path in tmp_path.iterdir()} == {
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
            "third",
        }
        with pytest.raises(ValueError, match="invalid `selected_adapters`"):
            model.save_pretrained(tmp_path, selected_adapters=["fourth"])

    def test_subfolders(self, tmp_path: Path) -> None:
        model = adapted(adapter_name="flowers")
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path, subfolder="flowers")
        assert torch.equal(logits(loaded), logits(model))
        assert PeftConfig.from_pretrained(tmp_path, subfolder="flowers").num_visual_prompts == 2
        loaded.load_adapter(tmp_path, "again", subfolder="flowers")
        loaded.set_adapter("again")
        assert torch.equal(logits(loaded), logits(model))

    @pytest.mark.parametrize("device_map", [{"": "cpu"}, "auto", "cpu"], ids=str)
    def test_device_map(self, device_map: Any, saved: tuple[PeftModel, Path], tmp_path: Path) -> None:
        model, folder = saved
        tiny_vit().save_pretrained(tmp_path / "backbone")
        backbone = AutoModelForImageClassification.from_pretrained(tmp_path / "backbone", device_map=device_map)
        loaded = PeftModel.from_pretrained(backbone, folder, device_map=device_map)
        assert torch.equal(logits(loaded), logits(model))
        assert torch.equal(logits(PeftModel.from_pretrained(tiny_vit(), folder, device_map=device_map)), logits(model))

    def test_peft_finds_config_backbone_and_class_of_an_adapter(self, tmp_path: Path) -> None:
        tiny_vit().save_pretrained(tmp_path / "backbone")
        model = adapted(AutoModelForImageClassification.from_pretrained(tmp_path / "backbone"))
        model.save_pretrained(tmp_path / "adapter")
        config = PeftConfig.from_pretrained(tmp_path / "adapter")
        assert isinstance(config, E2VPTConfig)
        assert config.base_model_name_or_path == str(tmp_path / "backbone")
        auto = AutoPeftModel.from_pretrained(tmp_path / "adapter")
        assert isinstance(auto, PeftModel) and isinstance(auto.base_model, E2VPTModel)
        assert torch.equal(logits(auto), logits(model))
        native = AutoModelForImageClassification.from_pretrained(tmp_path / "adapter")
        assert not isinstance(native, PeftModel)
        assert torch.equal(logits(native), logits(model))

    def test_an_existing_model_card_keeps_its_text(self, tmp_path: Path) -> None:
        card = tmp_path / "README.md"
        card.write_text("---\nlicense: mit\ntags:\n- mine\n---\n\n# Flowers\n\nTrained by hand.\n")
        adapted().save_pretrained(tmp_path)
        text = card.read_text()
        assert "# Flowers\n\nTrained by hand." in text and "license: mit" in text
        assert "library_name: peft" in text and "- PEFT " in text
        adapted().save_pretrained(tmp_path)
        assert card.read_text() == text

    def test_a_new_model_card_names_the_library(self, saved: tuple[PeftModel, Path]) -> None:
        assert "library_name: peft" in (saved[1] / "README.md").read_text()


class TestKeysThatDoNotMatch:
    def test_missing_keys_are_reported(self, saved: tuple[PeftModel, Path]) -> None:
        model, folder = saved
        tensors = load_file(folder / WEIGHTS)
        missing = "base_model.model.vit.layers.1.attention.e2vpt_kv_prompts"
        del tensors[missing]
        save_file(tensors, folder / WEIGHTS)
        with pytest.warns(UserWarning, match=rf"missing adapter keys.*{missing}\.default"):
            PeftModel.from_pretrained(tiny_vit(), folder)
        result = adapted(adapter_name="first").load_adapter(folder, "other")
        assert f"{missing}.other" in result.missing_keys
        assert not [key for key in result.missing_keys if "layers.0" in key or "visual" in key]

    @pytest.mark.parametrize("config", [small_config(), LoraConfig(target_modules=["q_proj"])], ids=["E2VPT", "LoRA"])
    def test_a_missing_head_is_a_bare_key_error_of_peft(self, config: PeftConfig) -> None:
        """PEFT looks the head up before it asks the method."""
        config.modules_to_save = ["classifier"]
        model = get_peft_model(tiny_vit(), config)
        state_dict = get_peft_model_state_dict(model)
        del state_dict["base_model.model.classifier.weight"]
        with pytest.raises(KeyError, match="classifier.weight"):
            set_peft_model_state_dict(model, state_dict)

    def test_unexpected_keys_are_reported(self, saved: tuple[PeftModel, Path]) -> None:
        model, folder = saved
        tensors = load_file(folder / WEIGHTS)
        unexpected = "base_model.model.vit.layers.1.attention.e2vpt_nonsense"
        tensors[unexpected] = torch.zeros(1)
        save_file(tensors, folder / WEIGHTS)
        assert model.load_adapter(folder, "other").unexpected_keys == [unexpected]

    def test_an_adapter_of_more_layers_of_this_backbone_reports_unexpected_keys(self, tmp_path: Path) -> None:
        prompts = get_peft_model_state_dict(adapted())
        result = set_peft_model_state_dict(adapted(layers_to_transform=[0]), prompts)
        assert len(result.unexpected_keys) == 4

    def test_mismatched_heads_can_be_ignored(self, saved: tuple[PeftModel, Path]) -> None:
        model, folder = saved
        other = tiny_vit(num_labels=7)
        with pytest.raises(RuntimeError, match="size mismatch for base_model.model.classifier"):
            PeftModel.from_pretrained(tiny_vit(num_labels=7), folder)
        with pytest.warns(UserWarning, match="ignore_mismatched_sizes"):
            loaded = PeftModel.from_pretrained(other, folder, ignore_mismatched_sizes=True)
        prompts = prompt_parameters(loaded)
        assert all(torch.equal(prompts[name], value) for name, value in prompt_parameters(model).items())


def test_the_state_dict_of_a_model_with_several_adapters(tmp_path: Path) -> None:
    model = adapted()
    model.add_adapter("other", small_config(num_visual_prompts=4))
    move_heads(model)
    saved = {name: get_peft_model_state_dict(model, adapter_name=name) for name in ("default", "other")}
    assert saved["default"].keys() == saved["other"].keys()
    fresh = adapted(num_visual_prompts=4)
    result = set_peft_model_state_dict(fresh, saved["other"])
    assert not result.unexpected_keys
    model.set_adapter("other")
    assert torch.equal(logits(fresh), logits(model))
