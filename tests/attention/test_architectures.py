from __future__ import annotations

import copy
import math

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from e2vpt_peft import E2VPTConfig
from e2vpt_peft.attention.architectures import ARCHITECTURES

from ..support.adapted import PROMPTS, adapt, adapted_layers, assert_close, inputs, make, run, tensors
from ..support.insertion import inserted
from ..support.models import BESIDE, prompt_parameters
from ..support.zoo import HEADS, ZOO

NO_TOKENS = {name for name, architecture in ARCHITECTURES.items() if not architecture.takes_tokens}
all_architectures = pytest.mark.parametrize("name", ZOO)
all_models = pytest.mark.parametrize("name", [*ZOO, *HEADS])
shallow_architectures = pytest.mark.parametrize("name", [name for name in ZOO if name not in NO_TOKENS])
both_attentions = pytest.mark.parametrize("attention", ["eager", "sdpa"])


def transformer_layer(model, name):
    """The layer around an attention: the innermost module with a number for a name."""
    path = name.split(".")
    depth = max(index for index, part in enumerate(path) if part.isdigit())
    return model.get_submodule(".".join(path[: depth + 1]))


def test_every_architecture_of_the_table_is_tested_here():
    assert ZOO.keys() | {"timm"} == ARCHITECTURES.keys()  # for timm see test_timm.py


@pytest.mark.parametrize(
    "name", [name for name in ZOO if ARCHITECTURES[name].modality == "vision" and "swin" not in name]
)
def test_what_is_not_an_image_patch_is_a_special_token(name):
    """Images have 4 by 4 patches, videos two layers of as many."""
    model, lengths = adapt(make(name), num_visual_prompts=0), []
    layer = next(iter(adapted_layers(model).values()))
    layer.base_layer.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append((args or tuple(kwargs.values()))[0].shape[1]), with_kwargs=True
    )
    run(model, inputs(name))
    num_patches = 32 if next(iter(inputs(name).values())).dim() == 5 else 16
    assert lengths[0] == num_patches + layer.site.num_special_tokens + layer.site.num_tokens_behind


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


@all_models
@torch.no_grad()
def test_key_value_prompts_beside_the_attention_add_nothing_without_values(name):
    """What each way in adds for given values, its own tests say."""
    outputs = {}
    for attention in ("eager", "sdpa"):
        backbone = make(name, attention)
        torch.manual_seed(0)
        model = adapt(backbone, **BESIDE)
        outputs[attention] = tensors(run(model, inputs(name)))
    for eager, sdpa in zip(outputs["eager"], outputs["sdpa"], strict=True):
        torch.testing.assert_close(eager, sdpa, rtol=1e-4, atol=1e-4)
    for layer in adapted_layers(model).values():
        layer.e2vpt_kv_prompts["default"][1].zero_()
    without = tensors(run(model, inputs(name)))
    assert not all(torch.allclose(one, other, atol=1e-3) for one, other in zip(without, outputs["sdpa"]))

    reference = adapt(make(name, "sdpa"), num_kv_prompts=0)
    for at, layer in adapted_layers(reference).items():
        layer.e2vpt_visual_prompts["default"].copy_(adapted_layers(model)[at].e2vpt_visual_prompts["default"])
    assert_close(without, tensors(run(reference, inputs(name))))


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
