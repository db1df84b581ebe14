from __future__ import annotations

import copy
import math

import pytest
import torch
import transformers as t
from peft import PeftModel, get_peft_model
from torch import nn

from e2vpt_peft import E2VPTConfig, E2VPTLayer
from e2vpt_peft.attention.architectures import ARCHITECTURES
from e2vpt_peft.attention.tokens import TokenInsertion

from ..support.insertion import inserted
from ..support.models import SIZES, images, prompt_parameters, randomized, tiny_vit
from ..support.zoo import HEADS, IMAGE, WORDS, ZOO

PROMPTS = {"num_visual_prompts": 3, "num_kv_prompts": 2, "num_segments": 4}
DEPTHS = {"beit segmentation": 4, "modernbert": 4, "dpt": 4, "swin": 3, "swinv2": 3}
NO_TOKENS = {name for name, architecture in ARCHITECTURES.items() if not architecture.takes_tokens}

all_architectures = pytest.mark.parametrize("name", ZOO)
all_models = pytest.mark.parametrize("name", [*ZOO, *HEADS])
shallow_architectures = pytest.mark.parametrize("name", [name for name in ZOO if name not in NO_TOKENS])
both_attentions = pytest.mark.parametrize("attention", ["eager", "sdpa"])


def make(name, attention="sdpa"):
    if "upernet" in name or name == "swinv2":
        attention = "eager"  # the only one that transformers lets them have
    return {**ZOO, **HEADS}[name].make(attention=attention)


def inputs(name, batch_size=3):
    return {**ZOO, **HEADS}[name].inputs(batch_size)


def adapt(model, **config):
    """With prompts of ordinary size, which reach a loss."""
    model = get_peft_model(model, E2VPTConfig(**{**PROMPTS, **config})).eval()
    with torch.no_grad():
        for parameter in prompt_parameters(model).values():
            parameter.copy_(torch.randn(parameter.shape))
    return model


def run(model, inputs, **kwargs):
    torch.manual_seed(0)  # some models mask tokens at random
    return model(**inputs, **kwargs)


def tensors(output):
    return [value for value in output.values() if isinstance(value, torch.Tensor) and value.is_floating_point()]


def assert_close(actual, expected):
    assert len(actual) == len(expected) > 0
    for mine, theirs in zip(actual, expected):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def adapted_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, E2VPTLayer)}


def transformer_layer(model, name):
    """The layer around an attention: the innermost module with a number for a name."""
    path = name.split(".")
    depth = max(index for index, part in enumerate(path) if part.isdigit())
    return model.get_submodule(".".join(path[: depth + 1]))


def test_every_architecture_of_the_table_is_tested_here():
    assert ZOO.keys() | {"timm"} == ARCHITECTURES.keys()  # for timm see test_timm.py


@all_models
def test_ready_made_targets_are_the_layers_of_the_encoder_and_nothing_else(name):
    names = adapted_layers(adapt(make(name))).keys()
    assert len(names) == DEPTHS.get(name, 2)
    for other in ("decoder", "predictor", "pooler", "text_model"):
        assert not any(other in each for each in names)


# Windows have a test of their own, and a head that reads what is between the layers would meet the reference's tokens.
@pytest.mark.parametrize(
    "name", [name for name in [*ZOO, *HEADS] if "swin" not in name and name != "beit segmentation"]
)
@both_attentions
@torch.no_grad()
def test_a_prefix_equals_inserted_tokens(name, attention):
    model = adapt(make(name, attention))
    layers = adapted_layers(model)
    actual = tensors(run(model, inputs(name)))

    prompts = [layer.e2vpt_visual_prompts["default"].clone() for layer in layers.values()]
    reference = adapt(make(name, attention), num_visual_prompts=0)
    for at, layer in adapted_layers(reference).items():
        layer.e2vpt_kv_prompts["default"].copy_(layers[at].e2vpt_kv_prompts["default"])
    with inserted([transformer_layer(reference, at) for at in layers], prompts):
        expected = tensors(run(reference, inputs(name)))

    assert_close(actual, expected)


@pytest.mark.parametrize(("name", "attention"), [("swin", "eager"), ("swin", "sdpa"), ("swinv2", "eager")])
@torch.no_grad()
def test_swin_prompts_join_every_window(name, attention):
    """Each window, shifted ones included, attends to [normed prompts ; window], by the equations."""
    model, reference = (adapt(make(name, attention), share_kv_prompts=False) for _ in range(2))
    for at, layer in adapted_layers(model).items():
        parent = reference.get_submodule(at.rpartition(".")[0])
        prompts, kv_prompts = layer.e2vpt_visual_prompts["default"], layer.e2vpt_kv_prompts["default"]
        if name == "swin":
            parent.attention = SwinByHand(parent.attention.base_layer, parent.layernorm_before(prompts), kv_prompts)
        else:
            parent.self = Swinv2ByHand(parent.self.base_layer, prompts, kv_prompts)
    assert_close(tensors(model(**inputs(name))), tensors(reference(**inputs(name))))
    assert any(getattr(block, "shift_size", 0) for block in reference.modules())


class SwinByHand(nn.Module):
    projections = ("q_proj", "k_proj", "v_proj")

    def __init__(self, bare, prompts, kv_prompts):
        super().__init__()
        self.bare, self.prompts, self.kv_prompts = bare, prompts, kv_prompts

    def scores(self, q, k):
        return q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5

    def bias(self):
        return self.bare.relative_position_bias()

    def forward(self, windows, mask=None, **kwargs):
        heads, extra, count = self.kv_prompts.shape[1], self.kv_prompts.shape[2], len(self.prompts)
        states = torch.cat([self.prompts.expand(len(windows), -1, -1), windows], 1)
        q, k, v = (
            getattr(self.bare, name)(states).unflatten(-1, (heads, -1)).transpose(1, 2) for name in self.projections
        )
        k, v = (torch.cat([rows.expand(len(windows), -1, -1, -1), x], 2) for rows, x in zip(self.kv_prompts, (k, v)))
        scores = self.scores(q, k)
        own = scores[:, :, count:, count + extra :]
        own += self.bias()
        if mask is not None:
            own.unflatten(0, (-1, len(mask))).add_(mask[:, None])
        return self.output((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)[:, count:])

    def output(self, states):
        return self.bare.o_proj(states), None


class Swinv2ByHand(SwinByHand):
    """With cosine attention. transformers adds the mask twice, and masks with -100."""

    projections = ("query", "key", "value")

    def scores(self, q, k):
        cosine = nn.functional.normalize(q, dim=-1) @ nn.functional.normalize(k, dim=-1).transpose(-1, -2)
        return cosine * self.bare.logit_scale.clamp(max=math.log(100)).exp()

    def bias(self):
        table = self.bare.continuous_position_bias_mlp(self.bare.relative_coords_table).flatten(0, -2)
        length = math.prod(self.bare.window_size)
        return 16 * table[self.bare.relative_position_index.flatten()].T.unflatten(-1, (length, length)).sigmoid()

    def forward(self, windows, mask=None, *args, **kwargs):
        return super().forward(windows, None if mask is None else 2 * mask)

    def output(self, states):
        return (states,)


@shallow_architectures
@both_attentions
@torch.no_grad()
def test_shallow_prompts_are_tokens_that_live_through_all_layers(name, attention):
    bare, reference = make(name, attention), make(name, attention)
    if name == "dpt":  # whose head reads what is between the layers
        bare, reference = bare.dpt, reference.dpt
    paths = [at.removeprefix("base_model.model.") for at in adapted_layers(adapt(copy.deepcopy(bare)))]
    model = adapt(bare, visual_prompt_depth="shallow", num_kv_prompts=0)
    (prompts,) = prompt_parameters(model).values()
    with inserted([transformer_layer(reference, at) for at in paths], [prompts]):
        expected = tensors(run(reference, inputs(name)))
    assert_close(tensors(run(model, inputs(name))), expected)


@pytest.mark.parametrize("name", sorted(NO_TOKENS & ZOO.keys()))
def test_shallow_prompts_are_refused_where_no_token_can_be_inserted(name):
    model = make(name)
    with pytest.raises(ValueError, match="visual_prompt_depth='shallow'.*'deep'"):
        get_peft_model(model, E2VPTConfig(**PROMPTS, visual_prompt_depth="shallow"))
    assert not adapted_layers(model)


@all_models
@torch.no_grad()
def test_outputs_have_the_backbones_own_shapes(name):
    bare = run(make(name), inputs(name), output_hidden_states=True)
    adapted = run(adapt(make(name)), inputs(name), output_hidden_states=True)
    assert adapted.keys() == bare.keys()
    for key in bare:
        assert [part.shape for part in _flat(adapted[key])] == [part.shape for part in _flat(bare[key])], key
    assert not all(torch.allclose(mine, theirs, atol=1e-3) for mine, theirs in zip(tensors(adapted), tensors(bare)))


def _flat(value):
    value = tuple(value.values()) if isinstance(value, dict) else value
    return [value] if isinstance(value, torch.Tensor) else [part for item in value or () for part in _flat(item)]


@all_architectures
@torch.no_grad()
def test_an_adapter_is_saved_and_loaded_and_unloaded(name, tmp_path):
    model = adapt(make(name))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(name), tmp_path)
    for mine, theirs in zip(tensors(run(loaded, inputs(name))), tensors(run(model, inputs(name))), strict=True):
        assert torch.equal(mine, theirs)
    bare, fresh = loaded.unload(), make(name)
    assert not adapted_layers(bare)
    assert all(torch.equal(tensor, fresh.state_dict()[key]) for key, tensor in bare.state_dict().items())
    assert_close(tensors(run(bare, inputs(name))), tensors(run(fresh, inputs(name))))


@all_architectures
def test_gradients_reach_every_prompt(name):
    model = adapt(make(name))
    generator = torch.Generator().manual_seed(3)  # a plain sum is constant behind a norm
    loss = sum(
        (value * torch.randn(value.shape, generator=generator)).sum() for value in tensors(run(model, inputs(name)))
    )
    loss.backward()
    for at, parameter in prompt_parameters(model).items():
        rows = parameter.grad.abs().sum(-1)
        assert rows.isfinite().all() and (rows > 0).all(), at


@all_architectures
@pytest.mark.parametrize("depth", ["deep", "shallow"])
@torch.no_grad()
def test_the_result_for_a_sample_does_not_depend_on_its_batch(name, depth):
    if depth == "shallow" and name in NO_TOKENS:
        pytest.skip("no token can be inserted")
    model = adapt(make(name), visual_prompt_depth=depth)
    batch = inputs(name, 4)
    together = tensors(run(model, batch))
    for index in range(4):
        alone = tensors(run(model, {key: value[index : index + 1] for key, value in batch.items()}))
        if name == "vit_mae":  # shuffles the patches of each sample
            alone, together = alone[:1], together[:1]
            torch.testing.assert_close(alone[0][0, 0], together[0][index, 0], rtol=1e-5, atol=1e-5)
            continue
        assert_close([value[0] for value in alone], [value[index] for value in together])


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "modernbert", "siglip2_vision_model", "wav2vec2"])
@both_attentions
@pytest.mark.parametrize("depth", ["deep", "shallow"])
@torch.no_grad()
def test_what_is_padding_does_not_matter(name, attention, depth):
    if depth == "shallow" and name in NO_TOKENS:
        pytest.skip("no token can be inserted")
    model = adapt(make(name, attention), visual_prompt_depth=depth)
    batch = inputs(name)
    mask = batch.get("attention_mask", batch.get("pixel_attention_mask")).bool()
    key = next(iter(batch))
    garbage = torch.where(mask.view(*mask.shape, *(1,) * (batch[key].dim() - 2)), batch[key], 7)
    assert not torch.equal(garbage, batch[key])
    expected, actual = (tensors(run(model, {**batch, key: values}))[0] for values in (batch[key], garbage))
    if expected.dim() == 3:  # a label for each token
        expected, actual = expected[mask], actual[mask]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["swin", "swinv2", "beit", "data2vec-vision", "modernbert", "internvl_vision"])
@torch.no_grad()
def test_different_adapters_in_one_batch(name):
    model = adapt(make(name))
    model.add_adapter("second", E2VPTConfig(**{**PROMPTS, "num_visual_prompts": 5}))
    names = ["second", "default", "__base__", "second"]
    batch = inputs(name, 4)
    together = tensors(model(**batch, adapter_names=names))
    for index, adapter in enumerate(names):
        one = {key: value[index : index + 1] for key, value in batch.items()}
        if adapter == "__base__":
            with model.disable_adapter():
                alone = tensors(model(**one))
        else:
            model.set_adapter(adapter)
            alone = tensors(model(**one))
        assert_close([value[0] for value in alone], [value[index] for value in together])


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


@pytest.mark.parametrize("model_type", ["clip", "siglip", "siglip2", "owlvit", "owlv2"])
def test_both_towers_are_adapted_when_asked(model_type):
    model = adapt(t.AutoModel.from_config(TOWERS[model_type]), target_modules=["self_attn"])
    assert {at.split(".")[2] for at in adapted_layers(model)} == {"vision_model", "text_model"}


@both_attentions
@torch.no_grad()
def test_a_causal_text_tower_sees_its_prompts_and_no_later_word(attention):
    config = ZOO["clip_vision_model"].config
    config._attn_implementation = attention
    model = randomized(t.CLIPTextModel._from_config(config.text_config, attn_implementation=attention))
    reference = randomized(t.CLIPTextModel._from_config(config.text_config, attn_implementation=attention))
    ids = torch.randint(3, 30, (2, 7))
    adapted = adapt(model, target_modules=["self_attn"], num_kv_prompts=0)
    actual = adapted(input_ids=ids).last_hidden_state
    prompts = [layer.e2vpt_visual_prompts["default"] for layer in adapted_layers(adapted).values()]
    with inserted(reference.encoder.layers, prompts):
        expected = reference(input_ids=ids).last_hidden_state
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    other = torch.cat([ids[:, :5], (ids[:, 5:] + 1) % 30], 1)
    torch.testing.assert_close(adapted(input_ids=other).last_hidden_state[:, :5], actual[:, :5])


def test_attention_norm_names_the_norm_of_an_unknown_model():
    model = tiny_vit()
    for layer in model.vit.layers:
        layer.oddly_named = layer.layernorm_before
    model.config.model_type = "unheard_of"
    config = {"target_modules": ["attention"], "num_segments": 1}
    found = get_peft_model(model, E2VPTConfig(**config, attention_norm="oddly_named"))
    assert {layer.site.norm_name for layer in adapted_layers(found).values()} == {"oddly_named"}


@torch.no_grad()
def test_num_special_tokens_tells_where_the_shallow_prompts_of_an_unknown_model_go():
    model = tiny_vit()
    model.config.model_type = "unheard_of"
    adapted = adapt(model, target_modules=["attention"], visual_prompt_depth="shallow", num_special_tokens=1)
    ways_in = [way_in for layer in adapted_layers(adapted).values() for way_in in layer.ways_in]
    (insertion,) = [way_in for way_in in ways_in if isinstance(way_in, TokenInsertion)]
    assert insertion.position == 1


@pytest.mark.parametrize(
    "target_modules",
    [["attention"], ["layers.0.attention", "layers.1.attention", "layers.2.attention"], r".*\.layers\.\d+\.attention"],
)
def test_targets_by_hand(target_modules):
    assert len(adapted_layers(get_peft_model(tiny_vit(), E2VPTConfig(target_modules=target_modules)))) == 3


SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 32}


@pytest.mark.parametrize(
    ("make", "config", "words"),
    [
        (tiny_vit, {"target_modules": ["mlp"]}, ["'vit.layers.0.mlp' (ViTMLP)", "no self-attention"]),
        (tiny_vit, {"target_modules": ["q_proj"]}, ["(Linear)", "no self-attention"]),
        (tiny_vit, {"target_modules": ["nowhere"]}, ["nowhere", "not found in the base model"]),
        (tiny_vit, {"attention_norm": "nonesuch"}, ["attention_norm='nonesuch'", "layernorm_before"]),
        (tiny_vit, {"num_segments": 7}, ["num_segments=7", "hidden size 32"]),
        (tiny_vit, {"layers_to_transform": [1, 9]}, ["layers_to_transform=[1, 9]", "no layer 9"]),
        (tiny_vit, {"layers_to_transform": -1}, ["layers_to_transform=-1", "no layer -1"]),
        (tiny_vit, {"layers_to_transform": [7]}, ["7"]),
        (
            lambda: t.LlamaModel(t.LlamaConfig(vocab_size=20, num_key_value_heads=4, **SMALL)),
            {"target_modules": ["self_attn"]},
            ["LlamaAttention", "causal"],
        ),
        (
            lambda: t.GPT2LMHeadModel(t.GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=20)),
            {"target_modules": ["attn"]},
            ["GPT2Attention", "causal"],
        ),
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
            lambda: t.BertModel(t.BertConfig(vocab_size=20, **SMALL, is_decoder=True, add_cross_attention=True)),
            {"target_modules": ["crossattention.self"]},
            ["(BertCrossAttention)", "cross-attention"],
        ),
        (lambda: make("vjepa2"), {"target_modules": ["cross_attn"]}, ["(VJEPA2PoolerCrossAttention)", "cross-att"]),
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
        (lambda: nn.Sequential(nn.Linear(2, 2)), {"target_modules": ["0"]}, ["'0' (Linear)", "no self-attention"]),
        (lambda: nn.Sequential(nn.Linear(2, 2)), {}, ["target_modules=None", "no module with 'Attention'"]),
    ],
)
def test_what_cannot_be_adapted_is_refused_with_its_name_and_the_reason_and_nothing_is_changed(make, config, words):
    model = make()
    before = {name: type(module) for name, module in model.named_modules()}
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError) as raised:
        get_peft_model(model, E2VPTConfig(**config))
    for word in words:
        assert word in str(raised.value)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trainable
    assert not hasattr(model, "peft_config")


def test_an_unlisted_model_is_told_what_to_target():
    model = tiny_vit()
    model.config.model_type = "unheard_of"
    with pytest.raises(ValueError, match=r"'vit.layers.0.attention' \(ViTAttention\).*target_modules.*check_prefix"):
        get_peft_model(model, E2VPTConfig())


def test_a_refused_second_adapter_leaves_the_first_as_it_was():
    model = get_peft_model(tiny_vit(), E2VPTConfig()).eval()
    before = model(pixel_values=images()).logits
    with pytest.raises(ValueError, match="num_segments=7"):
        model.add_adapter("second", E2VPTConfig(num_segments=7))
    assert list(model.peft_config) == ["default"]
    assert model.get_model_status().available_adapters == ["default"]
    assert torch.equal(model(pixel_values=images()).logits, before)


def test_sizes_need_not_be_those_of_vit_b():
    model = get_peft_model(tiny_vit(hidden_size=48, num_attention_heads=3), E2VPTConfig())
    site = model.base_model.model.vit.layers[0].attention.site
    assert (site.hidden_size, site.num_heads, site.head_size) == (48, 3, 16)
    assert site.patch_fan_in == 3 * SIZES["patch_size"] ** 2


@pytest.mark.parametrize(
    ("name", "values"), [("vit", 3 * 4 * 4), ("vivit", 3 * 2 * 4 * 4), ("videomae", 3 * 2 * 4 * 4), ("bert", 32)]
)
def test_initial_values_are_scaled_by_the_values_of_a_patch(name, values):
    layers = adapted_layers(get_peft_model(make(name), E2VPTConfig(**PROMPTS)))
    assert {layer.site.patch_fan_in for layer in layers.values()} == {values}
