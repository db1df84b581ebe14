from __future__ import annotations

import pytest
import transformers as t
from peft import LoraConfig, get_peft_model
from torch import nn

from e2vpt_peft import E2VPTConfig
from e2vpt_peft.adapter import PromptedAdapter
from e2vpt_peft.model_card.facts import card_adapter, count_all_parameters, find_base_model, find_task

from ..support.adapted import adapt
from ..support.bare import Bare
from ..support.models import tiny_vit
from ..support.zoo import ZOO
from .common import adapted

PLAIN = {"target_modules": ["attn"], "attention_norm": "ln_1"}


def test_a_card_is_about_the_first_active_adapter_unless_another_is_named():
    model = adapted()
    model.add_adapter("first", E2VPTConfig(num_visual_prompts=0, layers_to_transform=[2]))
    model.add_adapter("second", E2VPTConfig(num_visual_prompts=0))
    model.base_model.set_adapter(["first", "second"])
    assert card_adapter(model).name == "first"
    assert card_adapter(model, "second").name == "second"


def test_a_model_without_one_is_refused():
    with pytest.raises(ValueError, match="adapter_name='rocks' is no E2VPT adapter"):
        card_adapter(adapted(), "rocks")
    for model in (tiny_vit(), get_peft_model(tiny_vit(), LoraConfig(target_modules=["q_proj"]))):
        with pytest.raises(ValueError, match=r"the active E2VPT adapters are \[\]"):
            card_adapter(model)


def test_all_parameters_are_counted_as_peft_prints_them():
    model = adapted()
    assert count_all_parameters(model) == model.get_nb_trainable_parameters()[1]
    native = tiny_vit()
    native.add_adapter(E2VPTConfig(num_visual_prompts=4, num_kv_prompts=0))
    assert count_all_parameters(native) == count_all_parameters(tiny_vit()) + 3 * 4 * 32


def test_the_base_model_is_that_of_the_configuration_or_else_where_it_was_loaded_from():
    backbone = tiny_vit()
    model = adapted(backbone)
    adapter = PromptedAdapter.find(model)
    assert find_base_model(adapter) is None
    backbone.name_or_path = backbone.config._name_or_path = "google/vit-base"
    assert find_base_model(adapter) == "google/vit-base"
    adapter.config.base_model_name_or_path = "google/vit-large"
    assert find_base_model(adapter) == "google/vit-large"
    assert find_base_model(PromptedAdapter.find(adapt(Bare(), **PLAIN))) is None


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("vit", "image-classification"),
        ("yolos", "object-detection"),
        ("videomae", "video-classification"),
        ("bert", "text-classification"),
        ("distilbert", "token-classification"),
        ("audio-spectrogram-transformer", "audio-classification"),
        ("vit_mae", None),
    ],
)
def test_the_task_follows_from_the_class_of_the_model(name, task):
    assert find_task(ZOO[name].make()) == task


def test_segmentation_is_a_task_and_other_models_have_none():
    config = t.SegformerConfig(depths=[1] * 4, hidden_sizes=[8] * 4, num_attention_heads=[1] * 4)
    assert find_task(t.SegformerForSemanticSegmentation(config)) == "image-segmentation"
    assert find_task(nn.Linear(2, 2)) is None
