from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from peft import PeftConfig, get_peft_model

from e2vpt_peft import E2VPTConfig, E2VPTType

from .support.models import prompt_parameters, tiny_vit


def test_defaults_are_the_papers_most_used_setting():
    config = E2VPTConfig()
    assert (config.num_visual_prompts, config.visual_prompt_depth, config.num_kv_prompts) == (10, "deep", 5)
    assert config.share_kv_prompts is True
    assert config.init_weights == "kaiming_uniform"
    assert (config.prompt_dropout, config.kv_prompt_dropout, config.num_segments) == (0.1, 0.0, 16)
    assert config.task_type is None


def test_every_field_of_its_own_has_help():
    inherited = {field.name for field in dataclasses.fields(PeftConfig)}
    own = [field for field in dataclasses.fields(E2VPTConfig) if field.name not in inherited]
    assert len(own) >= 13
    assert all(field.metadata.get("help") for field in own)


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"num_visual_prompts": -1}, ValueError, ["num_visual_prompts=-1", "0 or more"]),
        ({"num_kv_prompts": -3}, ValueError, ["num_kv_prompts=-3", "0 or more"]),
        ({"num_visual_prompts": 2.0}, TypeError, ["num_visual_prompts=2.0", "integer"]),
        ({"num_kv_prompts": True}, TypeError, ["num_kv_prompts=True", "integer"]),
        ({"num_visual_prompts": 0, "num_kv_prompts": 0}, ValueError, ["num_visual_prompts=0", "num_kv_prompts=0"]),
        ({"visual_prompt_depth": "deeper"}, ValueError, ["visual_prompt_depth='deeper'", "'deep'", "'shallow'"]),
        ({"share_kv_prompts": "yes"}, TypeError, ["share_kv_prompts='yes'", "True or False"]),
        ({"kv_prompt_activation": "relu"}, ValueError, ["kv_prompt_activation='relu'", "None", "'gelu'"]),
        ({"kv_prompt_activation": "gelu"}, ValueError, ["kv_prompt_activation='gelu'", "share_kv_prompts=False"]),
        ({"init_weights": "zeros"}, ValueError, ["init_weights='zeros'", "'kaiming_uniform'", "'trunc_normal'"]),
        ({"prompt_dropout": 1.0}, ValueError, ["prompt_dropout=1.0", "[0, 1)"]),
        ({"prompt_dropout": -0.1}, ValueError, ["prompt_dropout=-0.1", "[0, 1)"]),
        ({"prompt_dropout": float("nan")}, ValueError, ["prompt_dropout=nan", "[0, 1)"]),
        ({"kv_prompt_dropout": 1.5}, ValueError, ["kv_prompt_dropout=1.5", "[0, 1)"]),
        ({"kv_prompt_dropout": "0.1"}, TypeError, ["kv_prompt_dropout='0.1'", "number"]),
        ({"num_segments": 0}, ValueError, ["num_segments=0", "1 or more"]),
        ({"target_modules": ".*", "layers_to_transform": [0]}, ValueError, ["layers_to_transform=[0]", "'.*'"]),
        ({"target_modules": ["attention"], "layers_pattern": "layers"}, ValueError, ["layers_pattern='layers'"]),
        ({"task_type": "VISION"}, ValueError, ["VISION"]),
    ],
)
def test_an_error_names_the_field_the_value_and_what_is_allowed(fields, error, words):
    with pytest.raises(error) as raised:
        E2VPTConfig(**fields)
    for word in words:
        assert word in str(raised.value)


def test_round_trip_through_a_file(tmp_path):
    config = E2VPTConfig(
        num_visual_prompts=7,
        visual_prompt_depth="shallow",
        num_kv_prompts=2,
        share_kv_prompts=False,
        kv_prompt_activation="gelu",
        init_weights="trunc_normal",
        prompt_dropout=0.2,
        kv_prompt_dropout=0.3,
        num_segments=8,
        target_modules=["attention"],
        exclude_modules=["layers.1.attention"],
        layers_to_transform=[0, 2],
        layers_pattern="layers",
        modules_to_save=["classifier"],
        attention_norm="norm1",
    )
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "E2VPT"
    for loaded in (PeftConfig.from_pretrained(tmp_path), E2VPTConfig.from_pretrained(tmp_path)):
        assert type(loaded) is E2VPTConfig
        assert loaded == config
        assert loaded.peft_type is E2VPTType.E2VPT


def test_a_field_of_a_newer_version_is_ignored_with_a_warning(tmp_path):
    E2VPTConfig().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "from_the_future": 1}))
    with pytest.warns(UserWarning, match="from_the_future"):
        assert PeftConfig.from_pretrained(tmp_path) == E2VPTConfig()


def test_an_invalid_value_in_a_file_is_an_error(tmp_path):
    E2VPTConfig().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_kv_prompts": -1}))
    with pytest.raises(ValueError, match="num_kv_prompts=-1"):
        PeftConfig.from_pretrained(tmp_path)


def test_masks_in_a_config_are_checked():
    with pytest.raises(ValueError, match="token_mask must be a list of 10"):
        E2VPTConfig(token_mask=[True])
    with pytest.raises(ValueError, match="token_mask must be a list of 10"):
        E2VPTConfig(token_mask=[1] * 10)
    with pytest.raises(ValueError, match="segment_mask must be a list of 10 lists of 16"):
        E2VPTConfig(segment_mask=[[True] * 16] * 9)
    with pytest.raises(ValueError, match="keeps nothing"):
        E2VPTConfig(token_mask=[False] * 10)
    apart = {"token_mask": [True, False], "segment_mask": [[False] * 4, [True] * 4]}
    with pytest.raises(ValueError, match="token_mask and segment_mask together keep no segment"):
        E2VPTConfig(num_visual_prompts=2, num_segments=4, **apart)


@pytest.mark.parametrize("init_weights", [True, False])
def test_init_weights_by_truth_value_means_the_default(init_weights, tmp_path):
    def drawn(**fields):
        torch.manual_seed(3)
        return prompt_parameters(get_peft_model(tiny_vit(), E2VPTConfig(**fields)))

    expected, found = drawn(), drawn(init_weights=init_weights)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    config = E2VPTConfig(init_weights=init_weights)
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).init_weights is init_weights


@pytest.mark.parametrize("value", [None, 0, 1, 1.0, ["kaiming_uniform"], "True"])
def test_init_weights_of_another_type_are_refused(value):
    with pytest.raises(ValueError, match="init_weights=.* must be .*'kaiming_uniform' or 'trunc_normal'"):
        E2VPTConfig(init_weights=value)
