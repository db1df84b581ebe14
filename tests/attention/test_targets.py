from __future__ import annotations

import pytest
import transformers as t
from peft import get_peft_model
from torch import nn

from e2vpt_peft import E2VPTConfig
from e2vpt_peft.attention.targets import explain_no_default_targets, find_default_targets

from ..support.adapted import adapt, adapted_layers, assert_refused, make
from ..support.bare import Bare, BareAttention
from ..support.models import tiny_vit
from ..support.zoo import HEADS, IMAGE, WORDS, ZOO

DEPTHS = {"beit segmentation": 4, "modernbert": 4, "dpt": 4, "swin": 3, "swinv2": 3}
all_models = pytest.mark.parametrize("name", [*ZOO, *HEADS])


@all_models
def test_ready_made_targets_are_the_layers_of_the_encoder_and_nothing_else(name):
    names = adapted_layers(adapt(make(name))).keys()
    assert len(names) == DEPTHS.get(name, 2)
    for other in ("decoder", "predictor", "pooler", "text_model"):
        assert not any(other in each for each in names)


LLAMA = {**WORDS, "pad_token_id": 0}
TOWERS = {
    "clip": ZOO["clip_vision_model"].config,
    "siglip": ZOO["siglip_vision_model"].config,
    "siglip2": ZOO["siglip2_vision_model"].config,
    "aimv2": t.Aimv2Config(vision_config=IMAGE, text_config={**WORDS, "eos_token_id": 2}, projection_dim=16),
    "owlvit": t.OwlViTConfig(vision_config=IMAGE, text_config=WORDS, projection_dim=16),
    "owlv2": t.Owlv2Config(vision_config=IMAGE, text_config=WORDS, projection_dim=16),
    "llava": t.LlavaConfig(vision_config=t.CLIPVisionConfig(**IMAGE), text_config=t.LlamaConfig(**LLAMA)),
    "internvl": t.InternVLConfig(
        vision_config=ZOO["internvl_vision"].config, text_config=t.Qwen2Config(**LLAMA, num_key_value_heads=4)
    ),
    "vision-text-dual-encoder": t.VisionTextDualEncoderConfig.from_vision_text_configs(
        t.ViTConfig(**IMAGE), t.BertConfig(**WORDS), projection_dim=16
    ),
}


@pytest.mark.parametrize("config", TOWERS.values(), ids=TOWERS.keys())
def test_of_several_towers_the_vision_tower_is_adapted(config):
    names = adapted_layers(adapt(t.AutoModel.from_config(config))).keys()
    assert len(names) == 2
    assert all("vision" in name for name in names)


@pytest.mark.parametrize("depth", ["deep", "shallow"])
def test_the_text_tower_does_not_stand_in_for_a_vision_tower_that_is_not_known(depth):
    hiera = t.HieraConfig(
        **{"embed_dim": 16, "image_size": [32, 32], "patch_stride": [2, 2], "patch_size": [3, 3], "depths": [1, 1]},
        **{"patch_padding": [1, 1], "masked_unit_size": [2, 2], "num_heads": [1, 2], "query_stride": [2, 2]},
        num_query_pool=1,
    )
    config = t.VisionTextDualEncoderConfig.from_vision_text_configs(hiera, t.BertConfig(**WORDS), projection_dim=16)
    model = t.VisionTextDualEncoderModel(config)
    words = ["vision tower, 'vision_model' (HieraModel)", "text tower, set target_modules=['attention.self']"]
    assert_refused(model, {"visual_prompt_depth": depth}, words)
    names = adapted_layers(adapt(model, target_modules=["attention.self"])).keys()
    assert len(names) == 2 and all("text_model" in name for name in names)


def test_the_text_tower_does_not_stand_in_for_a_sound_tower_that_is_not_known():
    clap = t.ClapAudioConfig(
        **{"patch_embeds_hidden_size": 16, "depths": [1, 1], "num_attention_heads": [2, 2], "hidden_size": 32},
        spec_size=64,
        num_mel_bins=16,
    )
    model = nn.ModuleDict({"sound": t.ClapAudioModel(clap), "words": ZOO["bert"].make()})
    assert_refused(model, {}, ["audio tower, 'sound' (ClapAudioModel)", "text tower, set target_modules=['words."])
    assert find_default_targets(model["words"]) == ["attention.self"]


@pytest.mark.parametrize("model_type", ["clip", "siglip", "siglip2", "owlvit", "owlv2"])
def test_both_towers_are_adapted_when_asked(model_type):
    model = adapt(t.AutoModel.from_config(TOWERS[model_type]), target_modules=["self_attn"])
    assert {at.split(".")[2] for at in adapted_layers(model)} == {"vision_model", "text_model"}


@pytest.mark.parametrize(
    "target_modules",
    [["attention"], ["layers.0.attention", "layers.1.attention", "layers.2.attention"], r".*\.layers\.\d+\.attention"],
)
def test_targets_by_hand(target_modules):
    assert len(adapted_layers(get_peft_model(tiny_vit(), E2VPTConfig(target_modules=target_modules)))) == 3


def test_what_is_inside_an_adapted_layer_is_no_target(tmp_path):
    """Where a pattern matches a layer, and the module inside that it has replaced."""
    model = get_peft_model(tiny_vit(), E2VPTConfig(target_modules=r".*\.attention(\.base_layer)?"))
    before = adapted_layers(model).keys()
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "other")
    assert adapted_layers(model).keys() == before and len(before) == 3


def test_an_unlisted_model_is_told_what_to_target():
    model = tiny_vit()
    model.config.model_type = "unheard_of"
    with pytest.raises(ValueError, match=r"'vit.layers.0.attention' \(ViTAttention\).*target_modules.*check_prefix"):
        get_peft_model(model, E2VPTConfig())


SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 32}


@pytest.mark.parametrize(
    ("make", "config", "words"),
    [
        (
            lambda: t.LlamaModel(t.LlamaConfig(vocab_size=20, **SMALL)),
            {},
            ["target_modules=None", "'layers.0.self_attn' (LlamaAttention)", "causal"],
        ),
        (
            lambda: t.BertLMHeadModel(t.BertConfig(vocab_size=20, **SMALL, is_decoder=True)),
            {},
            ["(BertSelfAttention)", "causal"],
        ),
        (
            lambda: t.HieraModel(t.HieraConfig(embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, image_size=[64, 64])),
            {},
            ["target_modules=None", "(HieraMaskUnitAttention)", "by hand"],
        ),
        (
            lambda: t.PvtV2Model(
                t.PvtV2Config(
                    image_size=32,
                    hidden_sizes=[8, 8, 8, 8],
                    depths=[1, 1, 1, 1],
                    num_attention_heads=[1, 1, 1, 1],
                )
            ),
            {},
            ["target_modules=None", "(PvtV2SelfAttention)", "by hand"],
        ),
        (
            lambda: t.MobileViTModel(
                t.MobileViTConfig(image_size=32, hidden_sizes=[8, 8, 8], neck_hidden_sizes=[4] * 7)
            ),
            {},
            ["target_modules=None", "(MobileViTSelfAttention)", "by hand"],
        ),
        (lambda: nn.Sequential(nn.Linear(2, 2)), {}, ["target_modules=None", "no module with 'Attention'"]),
    ],
)
def test_a_model_without_ready_made_targets_is_refused_with_the_reason(make, config, words):
    assert_refused(make(), config, words)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: t.LlamaModel(t.LlamaConfig(vocab_size=20, **SMALL)),
            "It has 'layers.0.self_attn' (LlamaAttention), which is causal: E2VPT needs bidirectional attention.",
        ),
        (
            lambda: t.BertModel(t.BertConfig(vocab_size=20, **SMALL, is_decoder=True)),
            "It has 'encoder.layer.0.attention.self' (BertSelfAttention), which is causal: E2VPT needs bidirectional "
            "attention.",
        ),
    ],
)
def test_the_reason_is_a_sentence_of_its_own(make, sentence):
    message = explain_no_default_targets(make())
    assert message == f"target_modules=None: there are no ready-made targets for this model. {sentence}"


def test_the_reason_for_attention_without_a_norm_reads_well_too():
    model = tiny_vit()
    model.config.model_type = "unheard_of"
    for layer in model.vit.layers:
        layer.oddly_named = layer.layernorm_before
        del layer.layernorm_before
    message = explain_no_default_targets(model)
    start, _, names = message.partition(" (the parents have: ")
    assert "It has 'vit.layers.0.attention' (ViTAttention), whose parents have no norm named one of layernorm" in start
    assert names.startswith("0, 1, 2, attention") and "oddly_named), or to 'none' if" in names


def test_only_the_innermost_attention_is_looked_at():
    class CausalAttention(BareAttention):
        is_causal = True

    model = Bare()
    model.blocks[0].attn = nn.ModuleDict({"inner": CausalAttention()})
    model.blocks[0].attn.__class__ = type("OuterAttention", (nn.ModuleDict,), {})
    assert "It has 'blocks.0.attn.inner' (CausalAttention), which is causal" in explain_no_default_targets(model)


def test_there_are_no_targets_in_a_model_that_nobody_knows():
    assert find_default_targets(Bare()) == []
    assert find_default_targets(nn.Linear(2, 2)) == []


def test_a_single_ending_stands_for_all_names_where_it_can():
    assert find_default_targets(tiny_vit()) == ["attention"]
    assert find_default_targets(make("vit_mae")) == ["attention"]
    names = find_default_targets(t.AutoModel.from_config(TOWERS["clip"]))
    assert names == [f"vision_model.encoder.layers.{index}.self_attn" for index in range(2)]
