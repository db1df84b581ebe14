"""Adding, activating, disabling, deleting and copying adapters."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    convert_to_lora,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)

from e2vpt_peft import E2VPTConfig

from ..support.models import images, prompt_parameters, tiny_vit
from .common import KINDS, adapted, assert_unchanged, layers_of, logits, move_heads, small_config, snapshot

PARTS = ["vit", "layers", "0", "attention", "weight", "classifier", "model", "modules_to_save", "e2vpt_kv_prompts"]
every_kind = pytest.mark.parametrize("kind", list(KINDS.values()), ids=list(KINDS))


def assert_regular(model: PeftModel, active: list[str], available: list[str], enabled: bool = True) -> None:
    status = model.get_model_status()
    assert status.enabled is enabled
    assert status.active_adapters == active
    assert status.available_adapters == sorted(available)
    assert status.merged_adapters == []
    assert status.requires_grad == {name: enabled and name in active for name in available}
    assert status.devices == {name: ["cpu"] for name in available}
    assert status.peft_types == dict.fromkeys(model.peft_config, "E2VPT")
    assert status.adapter_model_type == "E2VPTModel"
    for layer in model.get_layer_status():
        assert layer.active_adapters == active
        assert layer.enabled is enabled


def trainable(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


class TestAdding:
    def test_only_prompts_and_modules_to_save_are_trainable(self) -> None:
        model = adapted()
        assert trainable(model) == set(prompt_parameters(model)) | {
            f"base_model.model.classifier.modules_to_save.default.{name}" for name in ("weight", "bias")
        }

    @every_kind
    def test_a_second_adapter_changes_neither_the_output_nor_what_is_trainable(self, kind: dict) -> None:
        model = adapted(**kind)
        before, training = logits(model), trainable(model)
        model.add_adapter("other", small_config(num_visual_prompts=5))
        assert torch.equal(logits(model), before)
        assert trainable(model) == training
        assert_regular(model, ["default"], ["default", "other"])

    @every_kind
    def test_status_is_regular_when_adapters_are_in_different_layers(self, kind: dict) -> None:
        model = adapted(layers_to_transform=[0], **kind)
        model.add_adapter("last", small_config(layers_to_transform=[1, 2]))
        assert_regular(model, ["default"], ["default", "last"])
        model.set_adapter("last")
        assert_regular(model, ["last"], ["default", "last"])

    def test_a_name_that_is_taken_is_refused_without_changing_anything(self) -> None:
        model = adapted()
        before = snapshot(model)
        with pytest.raises(ValueError, match="'default' already exists"):
            model.add_adapter("default", small_config(num_visual_prompts=4))
        with pytest.raises(ValueError, match="Adapter with name 'default' already exists"):
            inject_adapter_in_model(small_config(num_visual_prompts=4), model.base_model.model, "default")
        assert_unchanged(model, before)
        assert model.peft_config["default"].num_visual_prompts == 2

    @pytest.mark.parametrize("name", ["a.b", "", "keys", "train", "__base__", *PARTS])
    def test_a_name_that_cannot_be_is_refused_in_words_without_changing_anything(self, name: str) -> None:
        backbone = tiny_vit()
        before = snapshot(backbone)
        with pytest.raises(ValueError, match=f"adapter_name='{name}' "):
            get_peft_model(backbone, small_config(), adapter_name=name)
        assert_unchanged(backbone, before)
        model = adapted()
        before = snapshot(model)
        with pytest.raises(ValueError, match=f"adapter_name='{name}' "):
            model.add_adapter(name, small_config())
        assert_unchanged(model, before)

    def test_peft_refuses_dots_for_lora_too(self) -> None:
        with pytest.raises(KeyError, match="name can"):
            get_peft_model(tiny_vit(), LoraConfig(target_modules=["q_proj"]), adapter_name="a.b")

    def test_peft_drops_lora_weights_of_adapters_whose_siblings_are_named_like_a_part_of_the_model(self) -> None:
        """Why such names are refused: adapter "b" comes out of it without what is in layer 0."""
        model = get_peft_model(tiny_vit(), LoraConfig(target_modules=["q_proj"]), adapter_name="0")
        model.add_adapter("b", LoraConfig(target_modules=["q_proj"]))
        saved = get_peft_model_state_dict(model, adapter_name="b")
        assert any(".layers.1." in key for key in saved) and not any(".layers.0." in key for key in saved)

    def test_names_that_are_prefixes_and_suffixes_of_each_other_work(self, tmp_path) -> None:
        names = ["ab", "a", "b", "abc", "c_ab", "ab_weight"]
        model = adapted(adapter_name="ab")
        for index, name in enumerate(names[1:]):
            model.add_adapter(name, small_config(num_visual_prompts=index + 1))
        move_heads(model)
        outputs = {}
        for name in names:
            model.set_adapter(name)
            outputs[name] = logits(model)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path / "a", adapter_name="a")
        for name in names:
            if name != "a":
                result = loaded.load_adapter(tmp_path / name, name)
                # PEFT also reports keys of other adapters that have this one's name anywhere in theirs.
                assert not [key for key in result.missing_keys if key.endswith(f".{name}")]
                assert not result.unexpected_keys
        for name in names:
            loaded.set_adapter(name)
            assert torch.equal(logits(loaded), outputs[name])
        loaded.delete_adapter("a")
        assert_regular(loaded, ["ab_weight"], [name for name in names if name != "a"])
        loaded.set_adapter("ab")
        assert torch.equal(logits(loaded), outputs["ab"])

    def test_peft_warns_of_a_name_within_the_parameter_prefix(self) -> None:
        with pytest.warns(UserWarning, match="should not be contained in the prefix 'e2vpt_'"):
            adapted().add_adapter("vpt", small_config())

    def test_a_config_that_is_refused_leaves_the_other_adapters_alone(self) -> None:
        model = adapted()
        before = snapshot(model)
        with pytest.raises(ValueError, match="num_segments=7"):
            model.add_adapter("other", small_config(num_segments=7))
        with pytest.raises(ValueError, match="num_segments=7"):
            inject_adapter_in_model(small_config(num_segments=7), model.base_model.model, "other")
        with pytest.raises(ValueError, match="no self-attention"):
            model.add_adapter("other", small_config(target_modules=["attention", "fc1"]))
        with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
            model.add_adapter("other", LoraConfig(target_modules=["q_proj"]))
        assert_unchanged(model, before)
        model.add_adapter("other", small_config())


class TestActivating:
    @every_kind
    def test_several_adapters_at_once_put_their_prompts_side_by_side(self, kind: dict) -> None:
        """As one adapter that has the prompts of both."""
        model = adapted(modules_to_save=None, **kind)
        model.add_adapter("other", small_config(num_visual_prompts=3, modules_to_save=None, **kind))
        model.base_model.set_adapter(["default", "other"])
        assert_regular(model, ["default", "other"], ["default", "other"])
        counts = {name: 2 * value for name, value in {"num_kv_prompts": 3}.items() if name not in kind}
        both = adapted(modules_to_save=None, **{"num_visual_prompts": 5, **counts, **kind})
        with torch.no_grad():
            for layer, joint in zip(layers_of(model), layers_of(both)):
                for prompts, joined, dim in (
                    (layer.e2vpt_visual_prompts, joint.e2vpt_visual_prompts, 0),
                    (layer.e2vpt_kv_prompts, joint.e2vpt_kv_prompts, -2),
                ):
                    if joined:
                        joined["default"].copy_(torch.cat([prompts["default"], prompts["other"]], dim))
        torch.testing.assert_close(logits(model), logits(both), atol=1e-5, rtol=1e-5)
        assert (logits(model) - logits(adapted())).abs().max() > 1e-3

    def test_two_heads_at_once_are_refused_by_peft(self) -> None:
        model = adapted()
        model.add_adapter("other", small_config())
        with pytest.raises(ValueError, match="Only one adapter can be set at a time"):
            model.base_model.set_adapter(["default", "other"])

    def test_set_adapter_switches_prompts_and_head(self) -> None:
        model = adapted()
        first = logits(model)
        model.add_adapter("other", small_config())
        model.set_adapter("other")
        assert_regular(model, ["other"], ["default", "other"])
        assert (logits(model) - first).abs().max() > 1e-3
        model.set_adapter("default")
        assert torch.equal(logits(model), first)

    def test_set_adapter_in_inference_mode_makes_nothing_trainable(self) -> None:
        model = adapted()
        model.set_adapter("default", inference_mode=True)
        assert not trainable(model)
        model.set_adapter("default")
        assert trainable(model)

    def test_an_unknown_adapter_is_refused(self) -> None:
        with pytest.raises(ValueError, match="Adapter other not found"):
            adapted().set_adapter("other")

    def test_set_requires_grad_of_one_and_of_several_adapters(self) -> None:
        model = adapted()
        model.add_adapter("other", small_config())
        model.set_requires_grad("default", False)
        assert not trainable(model)
        model.set_requires_grad(["default", "other"])
        assert model.get_model_status().requires_grad == {"default": True, "other": True}
        assert all(".default" in name or ".other" in name for name in trainable(model))
        assert model.get_model_status().active_adapters == ["default"]


class TestDisabling:
    @every_kind
    def test_the_backbone_is_back_within_the_context(self, kind: dict) -> None:
        model = adapted(**kind)
        before = logits(model)
        with model.disable_adapter():
            assert torch.equal(logits(model), logits(tiny_vit()))
            assert_regular(model, ["default"], ["default"], enabled=False)
        assert torch.equal(logits(model), before)
        assert_regular(model, ["default"], ["default"])

    def test_an_error_within_the_context_enables_them_again(self) -> None:
        model = adapted()
        with pytest.raises(RuntimeError), model.disable_adapter():
            raise RuntimeError
        assert_regular(model, ["default"], ["default"])

    def test_a_disabled_model_stays_so_behind_the_context(self) -> None:
        model = adapted()
        model.base_model.disable_adapter_layers()
        with model.disable_adapter():
            pass
        assert_regular(model, ["default"], ["default"], enabled=False)
        assert torch.equal(logits(model), logits(tiny_vit()))

    def test_a_disabled_model_gives_the_prompts_no_gradient(self) -> None:
        model = adapted()
        with model.disable_adapter():
            assert not model(images()).logits.requires_grad


class TestDeleting:
    @every_kind
    def test_the_active_one_hands_over_to_the_next(self, kind: dict) -> None:
        model = adapted(**kind)
        model.add_adapter("other", small_config(**kind))
        model.set_adapter("other")
        other = logits(model)
        model.set_adapter("default")
        with pytest.warns(UserWarning, match="Adapter default was active.*Setting active adapter to other") as warned:
            model.delete_adapter("default")
        assert [warning.filename for warning in warned if "was active" in str(warning.message)] == [__file__]
        assert_regular(model, ["other"], ["other"])
        assert model.active_adapter == "other"
        assert torch.equal(logits(model), other)
        assert not [name for name in model.state_dict() if "default" in name]

    def test_the_next_one_is_the_same_in_all_layers(self) -> None:
        """Where PEFT lets each layer choose among those that it has."""
        model = adapted(layers_to_transform=[0])
        model.add_adapter("everywhere", small_config())
        model.add_adapter("behind", small_config(layers_to_transform=[1, 2], modules_to_save=None))
        model.set_adapter("everywhere")
        with pytest.warns(UserWarning, match="Setting active adapter to default"):
            model.delete_adapter("everywhere")
        assert_regular(model, ["default"], ["default", "behind"])

    def test_an_adapter_without_a_head_hands_over_to_one_that_has(self) -> None:
        model = adapted()
        before = logits(model)
        model.add_adapter("headless", small_config(modules_to_save=None))
        model.set_adapter("headless")
        with pytest.warns(UserWarning, match="Setting active adapter to default"):
            model.delete_adapter("headless")
        assert_regular(model, ["default"], ["default"])
        assert torch.equal(logits(model), before)

    def test_one_of_several_active_ones_leaves_the_others_active(self) -> None:
        model = adapted(modules_to_save=None)
        for name in ("second", "third"):
            model.add_adapter(name, small_config(modules_to_save=None))
        model.base_model.set_adapter(["default", "third"])
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            model.delete_adapter("default")
        assert_regular(model, ["third"], ["second", "third"])

    @every_kind
    def test_an_inactive_one_changes_nothing_else(self, kind: dict) -> None:
        model = adapted(**kind)
        before = logits(model)
        model.add_adapter("other", small_config())
        model.delete_adapter("other")
        assert_regular(model, ["default"], ["default"])
        assert torch.equal(logits(model), before)

    @every_kind
    def test_behind_the_last_one_is_the_backbone_and_a_new_one_can_come(self, kind: dict) -> None:
        model = adapted(**kind)
        model.delete_adapter("default")
        assert not model.peft_config and not prompt_parameters(model)
        assert torch.equal(logits(model.base_model), logits(tiny_vit()))
        model.add_adapter("new", small_config(**kind))
        model.set_adapter("new")
        assert_regular(model, ["new"], ["new"])
        assert (logits(model) - logits(tiny_vit())).abs().max() > 1e-3

    def test_a_refused_adapter_behind_the_last_one_does_not_become_active(self) -> None:
        model = adapted()
        model.delete_adapter("default")
        with pytest.raises(ValueError, match="num_segments=7"):
            model.add_adapter("new", small_config(num_segments=7))
        assert model.base_model.active_adapters == []

    def test_an_unknown_one_is_refused(self) -> None:
        model = adapted()
        before = snapshot(model)
        with pytest.raises(ValueError, match="Adapter other does not exist"):
            model.delete_adapter("other")
        assert_unchanged(model, before)


class TestUnloading:
    @every_kind
    def test_unload_gives_the_backbone_back(self, kind: dict) -> None:
        backbone = tiny_vit()
        before = snapshot(backbone)
        model = adapted(backbone, **kind)
        logits(model)
        unloaded = model.unload()
        assert unloaded is backbone
        assert torch.equal(logits(unloaded), logits(tiny_vit()))
        after = snapshot(unloaded)
        assert after["modules"] == before["modules"]
        assert not hasattr(unloaded, "peft_config")

    def test_it_can_be_adapted_again(self) -> None:
        model = get_peft_model(adapted().unload(), small_config()).eval()
        assert_regular(model, ["default"], ["default"])


class TestCopying:
    @every_kind
    def test_a_deep_copy_is_the_same_model_and_a_separate_one(self, kind: dict) -> None:
        model = adapted(**kind)
        before = logits(model)
        twin = copy.deepcopy(model)
        assert torch.equal(logits(twin), before)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        model.base_model.disable_adapter_layers()
        model.base_model.model.set_attn_implementation("eager")
        assert torch.equal(logits(twin), before)
        assert torch.equal(logits(twin.unload()), logits(tiny_vit()))

    @every_kind
    def test_a_pickled_model_is_the_same_model(self, kind: dict) -> None:
        model = adapted(**kind)
        logits(model)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
        assert torch.equal(logits(twin), logits(model))
        twin.train()
        twin(images(), labels=torch.tensor([0, 1, 2])).loss.backward()
        assert all(parameter.grad is not None for parameter in prompt_parameters(twin).values())

    @every_kind
    def test_the_state_dict_goes_into_a_new_model(self, kind: dict) -> None:
        model = adapted(**kind)
        torch.manual_seed(1)
        other = adapted(tiny_vit(seed=1), **kind)
        assert (logits(other) - logits(model)).abs().max() > 1e-3
        other.load_state_dict(model.state_dict(), strict=True)
        assert torch.equal(logits(other), logits(model))


class TestWhatPromptsCannotDo:
    @pytest.mark.parametrize("safe_merge", [False, True])
    def test_merging_is_refused_in_words(self, safe_merge: bool) -> None:
        model = adapted()
        before = snapshot(model)
        for method in ("merge_and_unload", "merge_adapter"):
            with pytest.raises(ValueError, match="E2VPT adapters cannot be merged"):
                getattr(model, method)(safe_merge=safe_merge)
        with pytest.raises(ValueError, match="E2VPT adapters cannot be merged"):
            model.unmerge_adapter()
        assert_unchanged(model, before)

    def test_weighted_combination_is_refused_in_words(self) -> None:
        model = adapted()
        with pytest.raises(ValueError, match=r"cannot be combined.*set_adapter\(\[\.\.\.\]\)"):
            model.add_weighted_adapter(["default"], [1.0], "sum")

    def test_mixed_models_are_refused_by_peft(self) -> None:
        with pytest.raises(ValueError, match="'E2VPT' is not compatible with the `PeftMixedModel`"):
            get_peft_model(tiny_vit(), small_config(), mixed=True)

    def test_conversion_to_lora_is_refused_by_peft(self) -> None:
        model = adapted()
        assert not model.supports_lora_conversion()
        with pytest.raises(TypeError, match="do not support LoRA conversion.*E2VPTLayer"):
            convert_to_lora(model, 4)

    def test_conversion_with_the_initial_model_is_refused_by_peft(self, tmp_path) -> None:
        with pytest.raises(ValueError, match="not supported for E2VPTModel"):
            adapted().save_pretrained(tmp_path, path_initial_model_for_weight_conversion=str(tmp_path))

    def test_linear_layers_as_targets_are_refused_in_words(self) -> None:
        with pytest.raises(ValueError, match="no self-attention"):
            get_peft_model(tiny_vit(), E2VPTConfig(target_modules="all-linear"))


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_an_injection_that_fails_half_way_is_undone(kind: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fails: here, all is done but for the last step."""

    def fail(*_: object) -> None:
        raise RuntimeError("half-way")

    backbone, shallow = tiny_vit(), adapted(adapter_name="first", visual_prompt_depth="shallow")
    config = small_config(layers_to_transform=[1, 2], **kind)
    for model, put in (
        (backbone, lambda: get_peft_model(backbone, config)),
        (shallow, lambda: shallow.add_adapter("other", config)),
        (backbone, lambda: backbone.add_adapter(config)),
    ):
        before = snapshot(model)
        outputs = logits(model)
        with monkeypatch.context() as patch:
            patch.setattr("e2vpt_peft.model.route_modules_to_save", fail)
            with pytest.raises(RuntimeError, match="half-way"):
                put()
        assert_unchanged(model, before)
        assert config.target_modules is None and config.backbone is None
        assert torch.equal(logits(model), outputs)
    shallow.add_adapter("other", config)
    get_peft_model(backbone, config)
