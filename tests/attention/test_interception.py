from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from e2vpt_peft.attention.interception import ProductsMode, ThroughTorchFunctions
from e2vpt_peft.running_pass import passes_of

from ..support.adapted import adapt, adapted_layers, inputs, make
from ..support.bare import Bare
from ..support.models import BESIDE, prompt_parameters

CONFIG = {"target_modules": ["attn"], "num_segments": 1, "attention_norm": "ln_1"}


def test_only_the_adapted_modules_are_intercepted():
    model = adapt(Bare(), **{**CONFIG, "target_modules": ["1.attn"]})
    bare = copy.deepcopy(model).unload()
    x = torch.randn(2, 5, 8)
    assert torch.equal(model.base_model.model.blocks[0](x), bare.blocks[0](x))
    assert not torch.allclose(model.base_model.model.blocks[1](x), bare.blocks[1](x))


def test_the_prefix_is_left_out_when_adapters_are_disabled():
    model = adapt(Bare(), **CONFIG)
    x = torch.randn(2, 5, 8)
    with model.disable_adapter():
        disabled = model(x)
    assert torch.equal(disabled, copy.deepcopy(model).unload()(x))


def test_an_attention_that_goes_another_way_is_an_error(monkeypatch):
    model = adapt(Bare(), **CONFIG)
    monkeypatch.setattr(type(model.base_model.model.blocks[0].attn.base_layer), "forward", lambda self, x: x)
    with pytest.raises(
        RuntimeError, match=r"'blocks.0.attn' \(BareAttention\) has not called scaled_dot_product_attention"
    ):
        model(torch.randn(2, 5, 8))


def test_a_causal_call_is_an_error(monkeypatch):
    model = adapt(Bare(), **CONFIG)

    def causal(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    monkeypatch.setattr(type(model.base_model.model.blocks[0].attn.base_layer), "forward", causal)
    with pytest.raises(ValueError, match="is_causal=True.*bidirectional"):
        model(torch.randn(2, 5, 8))


class WrittenOut(nn.Module):
    """Attention as products and a softmax, of which `then` does something to the scores."""

    def __init__(self, bare, then=lambda scores: scores, dropout=0.0):
        super().__init__()
        self.bare, self.then, self.dropout = bare, then, dropout

    def forward(self, x):
        q, k, v = self.bare.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        scores = self.then(q @ k.transpose(-2, -1) / 2)
        probabilities = nn.functional.dropout(scores.softmax(-1), self.dropout)
        return self.bare.proj((probabilities @ v).transpose(1, 2).flatten(2))


def written_out(then, dropout=0.0, **config):
    model = adapt(Bare(), **CONFIG, **config)
    expected = model(torch.ones(2, 5, 8).cumsum(1))
    for layer in adapted_layers(model).values():
        layer.site = replace(layer.site, way_in=ThroughTorchFunctions(ProductsMode, "WrittenOut"))
        layer.forward = intercepted(layer, WrittenOut(layer.base_layer, then, dropout))
    return model, expected


def intercepted(layer, attention):
    def forward(x):
        with layer.site.way_in.running(layer):
            return attention(x)

    return forward


@pytest.mark.parametrize("config", [{}, BESIDE], ids=["in the softmax", "beside it"])
def test_attention_that_is_written_out_gives_the_same(config):
    model, expected = written_out(
        lambda scores: nn.functional.dropout(scores, 0.0).view(2, 1, 2, 5, 5).view(2, 2, 5, 5), **config
    )
    torch.testing.assert_close(model(torch.ones(2, 5, 8).cumsum(1)), expected)


@torch.no_grad()
def test_what_is_read_beside_the_attention_is_added_to_what_each_head_gives():
    model = adapt(Bare(), **CONFIG, **BESIDE, num_visual_prompts=0)
    x = torch.randn(2, 5, 8)
    for layer in adapted_layers(model).values():
        q, k, v = layer.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        keys, values = layer.e2vpt_kv_prompts["default"]
        heads = (q @ k.mT / 2).softmax(-1) @ v + nn.functional.gelu(q @ keys.mT / 2) @ values
        torch.testing.assert_close(layer(x), layer.proj(heads.transpose(1, 2).flatten(2)))


@torch.no_grad()
def test_attention_to_prompts_is_dropped_as_well():
    x = torch.ones(2, 5, 8).cumsum(1)
    model, _ = written_out(lambda scores: scores, dropout=1.0)
    for block in model.base_model.model.blocks:
        assert torch.equal(block.attn(block.ln_1(x)), block.attn.base_layer.proj.bias.expand(2, 5, -1))


@pytest.mark.parametrize("way", ["sdpa", "written out"])
@torch.no_grad()
def test_a_bias_on_rows_of_the_prefix_is_added_to_their_scores(way):
    """Of log 2, as if the row were there twice; far below zero, as if it were not there."""
    x = torch.ones(2, 5, 8).cumsum(1)
    model = written_out(lambda scores: scores)[0] if way == "written out" else adapt(Bare(), **CONFIG)
    count = 5  # 3 visual and 2 key-value prompts
    rows = {"twice": [0, 0, 1, 2, 3, 4], "not at all": [1, 2, 3, 4]}
    biases = {"twice": torch.tensor([[2.0, 1, 1, 1, 1]]).log(), "not at all": torch.tensor([[-1e9, 0, 0, 0, 0]])}
    for name, bias in biases.items():

        def biased(layer, prefix, batch_size, bias=bias):
            return prefix._replace(bias=bias)

        def other_rows(layer, prefix, batch_size, rows=rows[name]):
            assert prefix.keys.shape[1] == count
            return prefix._replace(keys=prefix.keys[:, rows], values=prefix.values[:, rows])

        with passes_of(model).running(edit_prefix=other_rows):
            expected = model(x)
        with passes_of(model).running(edit_prefix=biased):
            torch.testing.assert_close(model(x), expected)
        assert not torch.allclose(model(x), expected)


@pytest.mark.parametrize(
    ("then", "words"),
    [
        (lambda scores: scores.tanh(), "by which prompts cannot be followed: tanh"),
        (lambda scores: scores * torch.ones(5), "by which prompts cannot be followed: mul"),
    ],
)
def test_what_cannot_be_followed_is_an_error(then, words):
    model, _ = written_out(then)
    with pytest.raises(RuntimeError, match=words):
        model(torch.randn(2, 5, 8))


def test_a_product_that_is_not_square_is_not_taken_for_the_scores():
    """As where every head has a projection of its own."""
    model, expected = written_out(lambda scores: scores)
    for layer in adapted_layers(model).values():

        def projected_by_head(x, bare=layer.base_layer):
            weights = bare.qkv.weight.unflatten(0, (3, 2, 4)).transpose(-2, -1)  # (3, heads, hidden size, head size)
            bias = bare.qkv.bias.unflatten(0, (3, 2, 1, 4))
            q, k, v = (x[:, None] @ weights[part] + bias[part] for part in range(3))
            return bare.proj(((q @ k.transpose(-2, -1) / 2).softmax(-1) @ v).transpose(1, 2).flatten(2))

        layer.forward = intercepted(layer, projected_by_head)
    torch.testing.assert_close(model(torch.ones(2, 5, 8).cumsum(1)), expected)


def test_attention_without_two_products_is_an_error():
    model = adapt(Bare(), **CONFIG)
    layer = model.base_model.model.blocks[0].attn
    layer.site = replace(layer.site, way_in=ThroughTorchFunctions(ProductsMode, "Nothing"))
    with pytest.raises(RuntimeError, match="Nothing has not computed its attention as expected"):
        intercepted(layer, nn.Identity())(torch.randn(2, 5, 8))


@pytest.mark.slow  # compiled
def test_it_compiles_to_one_graph():
    model = adapt(make("data2vec-vision"))
    expected = model(**inputs("data2vec-vision")).logits
    expected.sum().backward()
    gradients = [parameter.grad.clone() for parameter in prompt_parameters(model).values()]
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    actual = compiled(**inputs("data2vec-vision")).logits
    actual.sum().backward()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    for parameter, gradient in zip(prompt_parameters(model).values(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)


NAMES = {"swinv2": {"eager"}, "data2vec-vision": {"sdpa"}}


def test_it_does_as_the_implementation_that_it_names():
    """Which says in what form masks are."""
    names = {name: {layer.implementation for layer in adapted_layers(adapt(make(name))).values()} for name in NAMES}
    assert names == NAMES
