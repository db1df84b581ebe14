"""PEFT keeps the configuration object that it is given. What that means where one serves several adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from torch import nn

from e2vpt_peft import E2VPTConfig, prune_prompts
from e2vpt_peft.adapter import PromptedAdapter

from ..support.models import prompt_parameters, tiny_vit
from ..support.zoo import ZOO
from .common import KINDS, adapted, assert_unchanged, logits, move_heads, small_config, snapshot

every_kind = pytest.mark.parametrize("kind", list(KINDS.values()), ids=list(KINDS))


def with_config(config: E2VPTConfig, backbone: nn.Module | None = None) -> PeftModel:
    return get_peft_model(backbone or tiny_vit(), config).eval()


class TestTheSameObject:
    """`model.peft_config[name] is config`, whichever way the adapter came in."""

    def test_of_a_new_adapter(self) -> None:
        config, other, injected = (small_config() for _ in range(3))
        model = with_config(config)
        model.add_adapter("other", other)
        assert model.peft_config["default"] is config and model.peft_config["other"] is other
        assert PromptedAdapter.find(model, "other").config is other
        assert inject_adapter_in_model(injected, tiny_vit()).peft_config["default"] is injected

    def test_of_a_saved_adapter(self, tmp_path: Path) -> None:
        model, config = adapted(), small_config()
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path, config=config)
        assert loaded.peft_config["default"] is config and config.inference_mode
        assert torch.equal(logits(loaded), logits(model))

    def test_through_transformers_own_methods(self) -> None:
        config, model = small_config(), tiny_vit()
        model.add_adapter(config)
        assert model.peft_config["default"] is config
        other, state_dict = small_config(), get_peft_model_state_dict(adapted())
        model = tiny_vit()
        model.load_adapter(peft_config=other, adapter_state_dict=state_dict)
        assert model.peft_config["default"] is other

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"num_segments": 7}, "num_segments=7"),
            ({"target_modules": ["fc1"]}, "no self-attention"),
            ({"target_modules": ["nowhere"]}, "No modules were targeted"),
            ({"layers_to_transform": [9]}, "no layer 9"),
        ],
    )
    def test_that_is_refused_is_as_it_was(self, fields: dict[str, Any], words: str) -> None:
        model, config = adapted(), small_config(**fields)
        for refuse in (lambda: get_peft_model(tiny_vit(), config), lambda: model.add_adapter("other", config)):
            before = {**vars(config)}
            with pytest.raises(ValueError, match=words):
                refuse()
            found = {name for name, value in vars(config).items() if value != before[name]}
            assert found <= {"base_model_name_or_path"}  # by PEFT, before it asks the method


class TestOneForSeveralAdapters:
    """Pruning gives an adapter a configuration of its own, so that one object can serve several."""

    @every_kind
    def test_of_one_model(self, kind: dict[str, Any], tmp_path: Path) -> None:
        config = small_config(**kind)
        model = with_config(config)
        model.add_adapter("other", config)
        assert model.peft_config["other"] is config
        move_heads(model)
        self.assert_pruning_leaves_the_other_alone(model, model, "other", tmp_path)
        assert model.peft_config["default"] is not config

    @every_kind
    def test_of_two_models(self, kind: dict[str, Any], tmp_path: Path) -> None:
        config = small_config(**kind)
        model, other = with_config(config), with_config(config)
        self.assert_pruning_leaves_the_other_alone(model, other, "default", tmp_path)

    def test_of_one_model_that_transformers_made(self) -> None:
        config, model = small_config(), tiny_vit()
        for name in ("default", "other"):
            model.add_adapter(config, adapter_name=name)
        prune_prompts(model, token_mask=[True, False], adapter_name="default")
        assert model.peft_config["default"].token_mask == [True, False]
        assert model.peft_config["other"] is config and config.token_mask is None

    @staticmethod
    def assert_pruning_leaves_the_other_alone(model: PeftModel, other: PeftModel, name: str, tmp_path: Path) -> None:
        config = other.peft_config[name]
        other.set_adapter(name)
        before, prompts = logits(other), prompt_parameters(other)
        segments = [[True] * 12 + [False] * 4] * 2
        prune_prompts(model, token_mask=[True, False], segment_mask=segments, adapter_name="default")
        assert model.peft_config["default"].token_mask == [True, False]
        assert config.token_mask is None and config.segment_mask is None
        assert other.peft_config[name] is config
        other.set_adapter(name)
        assert torch.equal(logits(other), before)
        after = prompt_parameters(other)
        assert all(after[key] is value for key, value in prompts.items() if f".{name}" in key)
        assert PromptedAdapter.find(other, name).masks.num_tokens == 2
        for source, adapter in ((model, "default"), (other, name)):
            source.set_adapter(adapter)
            source.save_pretrained(tmp_path / adapter / str(id(source)), selected_adapters=[adapter])
            folder = tmp_path / adapter / str(id(source)) / (adapter if adapter != "default" else "")
            assert torch.equal(logits(PeftModel.from_pretrained(tiny_vit(), folder)), logits(source))

    def test_another_size_of_backbone_is_refused_in_words(self) -> None:
        config = small_config()
        with_config(config)
        backbone, made_for = tiny_vit(hidden_size=48), config.backbone
        before = snapshot(backbone)
        with pytest.raises(ValueError, match=r"hidden size 32 \(this model: 48\).*give it a new configuration"):
            get_peft_model(backbone, config)
        assert_unchanged(backbone, before)
        assert config.backbone == made_for

    def test_the_targets_of_another_architecture_are_refused(self) -> None:
        """They were chosen for the first model, as PEFT chooses them for every method."""
        config = E2VPTConfig(num_visual_prompts=2)
        get_peft_model(tiny_vit(), config)
        backbone = ZOO["bert"].make()
        before = snapshot(backbone)
        with pytest.raises(ValueError, match="no self-attention"):
            get_peft_model(backbone, config)
        assert_unchanged(backbone, before)
        assert config.target_modules == {"attention"}
