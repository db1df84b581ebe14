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
from transformers import AutoModelForImageClassification, ViTModel

from e2vpt_peft import E2VPTConfig, E2VPTModel

from ..support.models import images, prompt_parameters, tiny_vit
from .common import KINDS, adapted, assert_unchanged, logits, move_heads, small_config, snapshot

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


VISUAL = "base_model.model.vit.layers.1.attention.e2vpt_visual_prompts"
KV = VISUAL.replace("visual", "kv")


class TestKeysThatDoNotMatch:
    """Prompts that are missing would be random, and those without a place would be left out without a word."""

    @pytest.mark.parametrize("missing", [[KV], [VISUAL], [KV, VISUAL]], ids=["kv", "visual", "layer"])
    def test_missing_prompts_are_refused(self, missing: list[str], saved: tuple[PeftModel, Path]) -> None:
        tensors = load_file(saved[1] / WEIGHTS)
        tensors = {name: value for name, value in tensors.items() if name not in missing}
        model = adapted(adapter_name="first")
        before = snapshot(model)
        with pytest.raises(ValueError, match="it has no .*layers.1.attention.e2vpt_.*, which would stay random"):
            set_peft_model_state_dict(model, tensors, "first")
        save_file(tensors, saved[1] / WEIGHTS)
        for load in (
            lambda: PeftModel.from_pretrained(tiny_vit(), saved[1]),
            lambda: model.load_adapter(saved[1], "other"),
            lambda: model.load_adapter(saved[1], "first"),
        ):
            with pytest.raises(ValueError, match="would (be|stay) random"):
                load()
        assert_unchanged(model, before)

    def test_prompts_that_have_no_place_are_refused(self) -> None:
        model = adapted(layers_to_transform=[0])
        before = snapshot(model)
        with pytest.raises(ValueError, match="it has .*layers.1.* and 1 more, for which there is no place"):
            set_peft_model_state_dict(model, get_peft_model_state_dict(adapted()))
        assert_unchanged(model, before)

    @pytest.mark.parametrize("config", [small_config(), LoraConfig(target_modules=["q_proj"])], ids=["E2VPT", "LoRA"])
    def test_a_missing_head_is_a_bare_key_error_of_peft(self, config: PeftConfig) -> None:
        """PEFT looks the head up before it asks the method."""
        config.modules_to_save = ["classifier"]
        model = get_peft_model(tiny_vit(), config)
        state_dict = get_peft_model_state_dict(model)
        del state_dict["base_model.model.classifier.weight"]
        before = snapshot(model)
        with pytest.raises(KeyError, match="classifier.weight"):
            set_peft_model_state_dict(model, state_dict)
        assert_unchanged(model, before)

    @pytest.mark.parametrize("change", [{"classifier.weight": None}, {"classifier.extra": torch.ones(1)}])
    def test_a_file_with_half_a_head_or_more_than_that_is_refused(
        self, change: dict[str, Any], saved: tuple[PeftModel, Path]
    ) -> None:
        changed = {f"base_model.model.{name}": value for name, value in change.items()}
        tensors = {**load_file(saved[1] / WEIGHTS), **changed}
        save_file({name: value for name, value in tensors.items() if value is not None}, saved[1] / WEIGHTS)
        model, backbone = adapted(adapter_name="first"), tiny_vit()
        for target, load in (
            (model, lambda: model.load_adapter(saved[1], "other")),
            (backbone, lambda: PeftModel.from_pretrained(backbone, saved[1])),
        ):
            before = snapshot(target)
            with pytest.raises(ValueError, match=f"has (no )?'{next(iter(changed))}'.*not those of this model"):
                load()
            assert_unchanged(target, before)


class TestHeadsOfAnotherSize:
    @pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": True}, {"is_trainable": True}], ids=str)
    def test_they_are_refused_and_nothing_is_changed(self, options: dict, saved: tuple[PeftModel, Path]) -> None:
        backbone, model = tiny_vit(num_labels=7), adapted(tiny_vit(num_labels=7), adapter_name="first")
        for target, load in (
            (backbone, lambda: PeftModel.from_pretrained(backbone, saved[1], **options)),
            (model, lambda: model.load_adapter(saved[1], "other", **options)),
            (model, lambda: model.load_adapter(saved[1], "first")),
        ):
            before = snapshot(target)
            with pytest.raises(ValueError, match=r"size mismatch for base_model.model.classifier.*num_labels"):
                load()
            assert_unchanged(target, before)
        model.load_adapter(saved[1], "other", ignore_mismatched_sizes=True)

    def test_they_can_be_ignored(self, saved: tuple[PeftModel, Path]) -> None:
        model, folder = saved
        with pytest.warns(UserWarning, match="ignore_mismatched_sizes"):
            loaded = PeftModel.from_pretrained(tiny_vit(num_labels=7), folder, ignore_mismatched_sizes=True)
        other = adapted(tiny_vit(num_labels=7), adapter_name="first")
        with pytest.warns(UserWarning, match="ignore_mismatched_sizes"):
            other.load_adapter(folder, "default", ignore_mismatched_sizes=True)
        for prompts in (prompt_parameters(loaded), prompt_parameters(other)):
            assert all(torch.equal(prompts[name], value) for name, value in prompt_parameters(model).items())


class TestLoadingOverAnAdapter:
    """PEFT reads no configuration then, so that the weights have to tell what they are."""

    @pytest.mark.parametrize("other", [*KINDS.values(), {"num_kv_prompts": 4}, {"share_kv_prompts": False}], ids=str)
    @pytest.mark.parametrize("mine", KINDS.values(), ids=list(KINDS))
    def test_an_adapter_of_another_kind_is_refused_whole(self, mine: dict, other: dict, tmp_path: Path) -> None:
        source, model = adapted(**other), adapted(**mine)
        source.save_pretrained(tmp_path)
        before = snapshot(model)
        if mine == other:
            model.load_adapter(tmp_path, "default")
            assert torch.equal(logits(model), logits(source))
            return
        with pytest.raises(ValueError, match="The state dict has other prompts than the adapter has in this model"):
            model.load_adapter(tmp_path, "default")
        assert_unchanged(model, before)

    def test_another_mask_of_as_many_segments_is_refused(self, tmp_path: Path) -> None:
        masks = [[[True] * 12 + [False] * 4] * 2, [[False] * 4 + [True] * 12] * 2]
        mine, other = (adapted(segment_mask=mask) for mask in masks)
        other.save_pretrained(tmp_path)
        before = snapshot(mine)
        with pytest.raises(ValueError, match="visual prompts of other segments than segment_mask says"):
            mine.load_adapter(tmp_path, "default")
        assert_unchanged(mine, before)
        mine.load_adapter(tmp_path, "other")
        mine.set_adapter("other")
        assert torch.equal(logits(mine), logits(other))

    def test_a_file_of_a_former_release_has_no_mask_beside_pruned_prompts_and_is_loaded(self, tmp_path: Path) -> None:
        model = adapted(segment_mask=[[True] * 12 + [False] * 4] * 2)
        model.save_pretrained(tmp_path)
        tensors = {name: value for name, value in load_file(tmp_path / WEIGHTS).items() if "mask" not in name}
        assert len(tensors) == len(load_file(tmp_path / WEIGHTS)) - 3
        save_file(tensors, tmp_path / WEIGHTS)
        for options in ({}, {"low_cpu_mem_usage": True}):
            loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path, **options)
            assert torch.equal(logits(loaded), logits(model))
            loaded.to(torch.float64)


class TestOtherNamesOfTheSameBackbone:
    def headless(self) -> Any:
        model = ViTModel(tiny_vit().config, add_pooling_layer=False)
        model.load_state_dict(tiny_vit().vit.state_dict())
        return model.eval()

    @pytest.mark.parametrize("kind", list(KINDS.values()), ids=list(KINDS))
    def test_an_adapter_of_the_model_without_a_head_fits_the_one_with_a_head(self, kind: dict, tmp_path: Path) -> None:
        config = small_config(modules_to_save=None, **kind)
        model = get_peft_model(self.headless(), config).eval()
        expected = model(images()).last_hidden_state
        model.save_pretrained(tmp_path / "headless")
        beside = adapted(adapter_name="first")
        beside.load_adapter(tmp_path / "headless", "other")
        beside.set_adapter("other")
        for loaded in (PeftModel.from_pretrained(tiny_vit(), tmp_path / "headless"), beside):
            assert torch.equal(loaded.get_base_model().vit(images()).last_hidden_state, expected)
            loaded.save_pretrained(tmp_path / "with head", selected_adapters=loaded.active_adapters)
        back = PeftModel.from_pretrained(self.headless(), tmp_path / "with head")
        assert torch.equal(back(images()).last_hidden_state, expected)

    @pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_fsdp_wrapped_module.", "base_model.model.", "vit."])
    def test_names_from_wrapped_models_are_understood(self, prefix: str, tmp_path: Path) -> None:
        model = adapted(modules_to_save=None)
        model.save_pretrained(tmp_path)
        tensors = load_file(tmp_path / WEIGHTS)
        plain = {name.removeprefix("base_model.model."): value for name, value in tensors.items()}
        for wrapped in (
            plain,
            {prefix + name: value for name, value in tensors.items()},
            {f"base_model.model.{prefix}{name}": value for name, value in plain.items()},
        ):
            save_file(wrapped, tmp_path / WEIGHTS)
            assert torch.equal(logits(PeftModel.from_pretrained(tiny_vit(), tmp_path)), logits(model))

    def test_heads_under_such_names_are_refused_in_words(self, saved: tuple[PeftModel, Path]) -> None:
        tensors = {f"module.{name}": value for name, value in load_file(saved[1] / WEIGHTS).items()}
        save_file(tensors, saved[1] / WEIGHTS)
        backbone = tiny_vit()
        before = snapshot(backbone)
        with pytest.raises(
            ValueError, match="has no 'base_model.model.classifier.*without wrappers such as torch.com"
        ):
            PeftModel.from_pretrained(backbone, saved[1])
        assert_unchanged(backbone, before)


class TestWhatIsSavedIsAccepted:
    def test_prompts_on_top_of_lora_of_the_same_name_are_saved_alone(self, tmp_path: Path) -> None:
        lora = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        with_lora = get_peft_model(tiny_vit(), lora)
        with_lora.save_pretrained(tmp_path / "lora")
        with pytest.warns(UserWarning, match="adapter_name='default' is also the name of a LORA adapter"):
            model = get_peft_model(with_lora.base_model.model, small_config()).eval()
        model.save_pretrained(tmp_path / "prompts")
        names = load_file(tmp_path / "prompts" / WEIGHTS)
        assert not [name for name in names if "lora_" in name]
        again = PeftModel.from_pretrained(tiny_vit(), tmp_path / "lora").base_model.model
        with pytest.warns(UserWarning, match="is also the name of a LORA adapter"):
            loaded = PeftModel.from_pretrained(again, tmp_path / "prompts")
        assert torch.equal(logits(loaded), logits(model))

    def test_a_head_of_lora_of_the_same_name_would_be_saved_and_is_refused(self) -> None:
        lora = get_peft_model(tiny_vit(), LoraConfig(target_modules=["q_proj"], modules_to_save=["classifier"]))
        before = snapshot(lora)
        with pytest.raises(ValueError, match=r"whose modules_to_save=\['classifier'\] would be saved with it"):
            get_peft_model(lora.base_model.model, small_config(modules_to_save=None))
        assert_unchanged(lora, before)

    def test_an_adapter_that_is_not_whole_is_not_saved(self, tmp_path: Path) -> None:
        model = adapted()
        whole = model.state_dict()
        part = {name: value for name, value in whole.items() if "layers.1.attention.e2vpt_kv" not in name}
        with pytest.raises(
            ValueError, match="about to be saved of adapter 'default'.* it has no .*layers.1.*kv_prompts"
        ):
            model.save_pretrained(tmp_path, state_dict=part)
        assert not (tmp_path / WEIGHTS).exists()
        empty = {
            name: value[:0] if "e2vpt_" in name else value for name, value in whole.items()
        }  # as ZeRO 3 leaves it
        with pytest.raises(ValueError, match=r"has shape \(0, 32\), but here it has \(2, 32\)"):
            model.save_pretrained(tmp_path, state_dict=empty)

    def test_prompts_that_are_not_finite_are_saved_with_a_warning(self, tmp_path: Path) -> None:
        """A run that diverged may be one of many, which should not end with it."""
        model = adapted()
        next(iter(prompt_parameters(model).values())).data.fill_(float("nan"))
        with pytest.warns(RuntimeWarning, match="is saved, but cannot be loaded.* are NaN"):
            model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="are NaN"):
            PeftModel.from_pretrained(tiny_vit(), tmp_path)


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
