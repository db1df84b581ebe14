"""Ways to an adapted model other than `get_peft_model` and `PeftModel.from_pretrained`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils.hotswap import hotswap_adapter
from transformers import AutoModelForImageClassification

from ..support.models import prompt_parameters, tiny_vit
from .common import KINDS, adapted, assert_unchanged, layers_of, logits, move_heads, small_config, snapshot

every_kind = pytest.mark.parametrize("kind", list(KINDS.values()), ids=list(KINDS))


def lora(*targets: str, **config: Any) -> LoraConfig:
    return LoraConfig(target_modules=list(targets), init_lora_weights=False, **config)


class TestInjecting:
    @every_kind
    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_state_dicts_go_from_one_injected_model_to_another(self, kind: dict, low_cpu_mem_usage: bool) -> None:
        model = inject_adapter_in_model(small_config(**kind), tiny_vit())
        move_heads(model)
        state_dict = get_peft_model_state_dict(model)
        other = inject_adapter_in_model(small_config(**kind), tiny_vit(), low_cpu_mem_usage=low_cpu_mem_usage)
        result = set_peft_model_state_dict(other, state_dict, low_cpu_mem_usage=low_cpu_mem_usage)
        assert not result.unexpected_keys
        assert not [key for key in result.missing_keys if "e2vpt_" in key]
        assert torch.equal(logits(other.eval()), logits(model.eval()))

    def test_it_is_the_model_of_get_peft_model(self) -> None:
        wrapped = adapted(modules_to_save=None)
        injected = inject_adapter_in_model(small_config(modules_to_save=None), tiny_vit())
        set_peft_model_state_dict(injected, get_peft_model_state_dict(wrapped))
        assert torch.equal(logits(injected), logits(wrapped))
        status = get_model_status(injected)
        assert status.enabled is True and status.active_adapters == ["default"]
        assert status.requires_grad == {"default": True}

    def test_a_second_injection_adds_an_active_adapter(self) -> None:
        model = inject_adapter_in_model(small_config(modules_to_save=None), tiny_vit(), "one")
        model = inject_adapter_in_model(small_config(modules_to_save=None), model, "two")
        assert list(model.peft_config) == ["one", "two"]
        status = get_model_status(model)
        assert status.available_adapters == ["one", "two"] and status.active_adapters == ["two"]

    def test_targets_from_a_state_dict(self) -> None:
        saved = get_peft_model_state_dict(inject_adapter_in_model(small_config(), tiny_vit()))
        only = {key: value for key, value in saved.items() if "layers.1" in key}
        with pytest.warns(RuntimeWarning, match="inconsistency"):
            model = inject_adapter_in_model(small_config(), tiny_vit(), state_dict=only)
        assert len(layers_of(model)) == 1

    def test_a_given_state_dict_is_used_for_saving(self) -> None:
        model = adapted()
        doubled = {name: value * 2 for name, value in model.state_dict().items()}
        once, twice = get_peft_model_state_dict(model), get_peft_model_state_dict(model, state_dict=doubled)
        assert all(torch.equal(twice[name], once[name] * 2) for name in once)


class TestTransformersOwnMethods:
    @every_kind
    def test_add_disable_enable_set_and_delete(self, kind: dict) -> None:
        model = tiny_vit()
        backbone = logits(model)
        model.add_adapter(small_config(modules_to_save=None, **kind), adapter_name="one")
        first = logits(model)
        assert (first - backbone).abs().max() > 1e-3
        model.disable_adapters()
        assert torch.equal(logits(model), backbone)
        model.enable_adapters()
        assert torch.equal(logits(model), first)
        model.add_adapter(small_config(modules_to_save=None, **kind), adapter_name="two")
        assert model.active_adapters() == ["two"]
        second = logits(model)
        model.set_adapter("one")
        assert torch.equal(logits(model), first)
        model.set_adapter(["one", "two"])
        assert model.active_adapters() == ["one", "two"]
        model.set_adapter("two")
        model.delete_adapter("one")
        assert list(model.peft_config) == ["two"]
        assert torch.equal(logits(model), second)
        with pytest.raises(ValueError, match="not present|not found|do not exist"):
            model.delete_adapter("one")

    def test_a_name_that_is_taken_is_refused_without_changing_anything(self) -> None:
        model = tiny_vit()
        model.add_adapter(small_config(), adapter_name="one")
        before = snapshot(model)
        with pytest.raises(ValueError, match="one already exists"):
            model.add_adapter(small_config(), adapter_name="one")
        with pytest.raises(ValueError, match="adapter_name='a.b' "):
            model.add_adapter(small_config(), adapter_name="a.b")
        assert_unchanged(model, before)

    def test_a_first_adapter_that_is_refused_can_be_corrected(self) -> None:
        model = tiny_vit()
        with pytest.raises(ValueError, match="num_segments=7"):
            model.add_adapter(small_config(num_segments=7))
        model.add_adapter(small_config())
        assert model.active_adapters() == ["default"]

    @every_kind
    def test_what_it_saves_it_loads_and_peft_loads(self, kind: dict, tmp_path: Path) -> None:
        tiny_vit().save_pretrained(tmp_path / "backbone")
        model = AutoModelForImageClassification.from_pretrained(tmp_path / "backbone")
        model.add_adapter(small_config(**kind))
        move_heads(model)
        model.save_pretrained(tmp_path / "adapter")
        assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
        }
        reference = logits(model.eval())
        assert torch.equal(logits(AutoModelForImageClassification.from_pretrained(tmp_path / "adapter")), reference)
        assert torch.equal(logits(PeftModel.from_pretrained(tiny_vit(), tmp_path / "adapter")), reference)
        other = tiny_vit()
        result = other.load_adapter(str(tmp_path / "adapter"))
        assert not result.missing_keys and not result.unexpected_keys and not result.mismatched_keys
        assert torch.equal(logits(other), reference)
        assert not any(parameter.requires_grad for parameter in prompt_parameters(other).values())

    def test_it_loads_what_peft_saves(self, tmp_path: Path) -> None:
        wrapped = adapted()
        wrapped.save_pretrained(tmp_path)
        model = tiny_vit()
        model.load_adapter(str(tmp_path), adapter_name="two", is_trainable=True)
        assert torch.equal(logits(model), logits(wrapped))
        assert all(parameter.requires_grad for parameter in prompt_parameters(model).values())

    def test_it_loads_a_given_state_dict(self) -> None:
        wrapped = adapted()
        model = tiny_vit()
        model.load_adapter(peft_config=small_config(), adapter_state_dict=get_peft_model_state_dict(wrapped))
        assert torch.equal(logits(model), logits(wrapped))

    @pytest.mark.parametrize("method", ["E2VPT", "LoRA"])
    def test_enable_adapters_forgets_modules_to_save(self, method: str) -> None:
        """A mistake of transformers, for every method: `set_adapter` does not help either, which is worth knowing."""
        model = tiny_vit()
        model.add_adapter(small_config() if method == "E2VPT" else lora("q_proj", modules_to_save=["classifier"]))
        model.disable_adapters()
        model.enable_adapters()
        assert get_model_status(model).enabled == "irregular"
        assert model.classifier.disable_adapters
        model.classifier.enable_adapters(True)
        assert get_model_status(model).enabled is True

    def test_its_state_dict_is_that_of_peft(self) -> None:
        model = tiny_vit()
        model.add_adapter(small_config())
        prompts = get_peft_model_state_dict(model)
        assert prompts.keys() == model.get_adapter_state_dict().keys()
        assert len(prompts) == 8


class TestTogetherWithLora:
    """PEFT looks for targets outside of what another method has adapted, so LoRA has to come first."""

    def test_prompts_go_on_top_of_lora(self) -> None:
        with_lora = get_peft_model(tiny_vit(), lora("q_proj", "v_proj", "fc1"), adapter_name="lora").eval()
        before = logits(with_lora)
        model = get_peft_model(with_lora, small_config(target_modules=["attention"], modules_to_save=None)).eval()
        after = logits(model)
        assert (after - before).abs().max() > 1e-3
        assert get_model_status(model).enabled is True
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        lora_parameters = {name for name, _ in model.named_parameters() if ".lora_" in name}
        assert trainable == set(prompt_parameters(model)) | lora_parameters  # PEFT leaves what was trainable
        with model.disable_adapter():  # of all methods, as PEFT does it
            assert torch.equal(logits(model), logits(tiny_vit()))
        assert torch.equal(logits(model), after)

    def test_deep_prompts_go_through_the_adapted_projections(self) -> None:
        """Prompts on top of LoRA are the same as prompts in a backbone that LoRA has been merged into."""
        torch.manual_seed(1)
        merged = get_peft_model(tiny_vit(), lora("k_proj", "v_proj")).merge_and_unload()
        torch.manual_seed(1)
        with_lora = get_peft_model(tiny_vit(), lora("k_proj", "v_proj"))
        model = adapted(with_lora.base_model.model, adapter_name="prompts", modules_to_save=None)
        twin = adapted(merged, adapter_name="prompts", modules_to_save=None)
        twin.load_state_dict(prompt_parameters(model), strict=False)
        torch.testing.assert_close(logits(model), logits(twin), atol=1e-4, rtol=1e-4)

    def test_native_adapters_of_both_methods(self) -> None:
        model = tiny_vit()
        model.add_adapter(lora("q_proj", "v_proj"), adapter_name="lora")
        before = logits(model)
        model.add_adapter(small_config(modules_to_save=None), adapter_name="prompts")
        model.set_adapter(["lora", "prompts"])
        both = logits(model)
        model.set_adapter("lora")
        assert torch.equal(logits(model), before)
        assert (both - before).abs().max() > 1e-3

    def test_lora_outside_of_the_attention_can_come_afterwards(self) -> None:
        model = adapted(modules_to_save=None)
        before = logits(model)
        both = get_peft_model(model, lora("fc1", "fc2"), adapter_name="lora").eval()
        assert (logits(both) - before).abs().max() > 1e-3
        trainable = {name for name, parameter in both.named_parameters() if parameter.requires_grad}
        assert trainable == {name for name, _ in both.named_parameters() if ".lora_" in name or "e2vpt_" in name}

    @pytest.mark.parametrize("target", ["q_proj", "v_proj", "o_proj"])
    def test_lora_inside_of_the_attention_cannot_and_peft_says_so(self, target: str) -> None:
        model = adapted(modules_to_save=None)
        before = snapshot(model)
        with pytest.raises(ValueError, match="not found in the base model"):
            get_peft_model(model, lora(target), adapter_name="lora")
        after = snapshot(model)
        assert after["modules"] == before["modules"]


class TestHotswapping:
    """PEFT lets LoRA alone in: `peft.utils.hotswap` rescales and pads the ranks of `LoraLayer`."""

    def test_peft_refuses(self, tmp_path: Path) -> None:
        model = adapted()
        model.save_pretrained(tmp_path)
        before = snapshot(model)
        with pytest.raises(ValueError, match="Hotswapping only supports LORA but E2VPT was passed"):
            hotswap_adapter(model, tmp_path, "default")
        assert_unchanged(model, before)

    def test_transformers_refuses(self, tmp_path: Path) -> None:
        adapted().save_pretrained(tmp_path)
        model = tiny_vit()
        model.load_adapter(str(tmp_path))
        with pytest.raises(ValueError, match="only supported for LoRA"):
            model.load_adapter(str(tmp_path), adapter_name="default", hotswap=True)

    def test_loading_into_the_adapter_in_place_does_the_same(self, tmp_path: Path) -> None:
        other = adapted()
        other.save_pretrained(tmp_path)
        model = adapted()
        model.load_adapter(tmp_path, "default")
        assert torch.equal(logits(model), logits(other))
