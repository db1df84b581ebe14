"""The prefix, and shallow tokens, against a reference that inserts all visual prompts as tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from e2vpt_peft.attention.prefix import prepend

from ..support.flex import skip_where_torch_is_wrong
from ..support.models import TINY_MODELS, images, tiny_vit
from ..support.prompted import with_prompts
from ..support.reference import random_prompts, token_insertion

KINDS = {
    "deep": {"tokens": 4, "kv_prompts": 3},
    "deep, separate": {"tokens": 4, "kv_prompts": 3, "share": False},
    "visual prompts only": {"tokens": 4, "kv_prompts": 0},
    "key-value prompts only": {"tokens": 0, "kv_prompts": 3},
    "deep, beside": {"tokens": 4, "kv_prompts": 3, "share": False, "gelu": True},
    "key-value prompts only, beside": {"tokens": 0, "kv_prompts": 3, "share": False, "gelu": True},
    "shallow, beside": {"tokens": 4, "kv_prompts": 3, "shallow": True, "share": False, "gelu": True},
    "shallow": {"tokens": 4, "kv_prompts": 3, "shallow": True},
    "shallow, visual prompts only": {"tokens": 4, "kv_prompts": 0, "shallow": True},
}

all_kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
all_models = pytest.mark.parametrize("make", TINY_MODELS.values(), ids=TINY_MODELS.keys())


def rms(error):
    return error.detach().float().square().mean().sqrt()


@all_models
@all_kinds
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_and_hidden_states_equal_token_insertion(make, kind, attention):
    model = make()
    prompts = random_prompts(model, **kind)
    logits, states = token_insertion(model, images(), prompts)

    model.set_attn_implementation(attention)
    adapted = with_prompts(model, prompts)
    output = adapted(pixel_values=images(), output_hidden_states=True)

    torch.testing.assert_close(output.logits, logits, rtol=1e-5, atol=1e-5)
    assert len(output.hidden_states) == len(states)
    for actual, expected in zip(output.hidden_states, states):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@all_models
@all_kinds
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_an_attention_mask_of_the_user_hides_tokens_and_no_prompts(make, kind, attention):
    model = make()
    prompts = random_prompts(model, **kind)
    key_mask = torch.ones(3, 16 + (2 if model.config.model_type == "deit" else 1), dtype=torch.bool)
    key_mask[0, 5:] = False
    key_mask[1, 2:9] = False
    logits, _ = token_insertion(model, images(), prompts, key_mask)

    model.set_attn_implementation(attention)
    output = with_prompts(model, prompts)(pixel_values=images(), attention_mask=key_mask)

    torch.testing.assert_close(output.logits, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.slow  # flex attention is compiled
@pytest.mark.parametrize("kind", ["deep", "shallow"])
@torch.no_grad()  # of which flex attention has none on a CPU
def test_flex_attention_equals_token_insertion(kind):
    skip_where_torch_is_wrong()
    model = tiny_vit(hidden_size=64)
    prompts = random_prompts(model, **KINDS[kind])
    logits, _ = token_insertion(model, images(), prompts)
    adapted = with_prompts(model, prompts)
    adapted.set_attn_implementation("flex_attention")
    torch.testing.assert_close(adapted(pixel_values=images()).logits, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_flex_attention_with_a_mask_equals_token_insertion():
    skip_where_torch_is_wrong()
    model = tiny_vit(hidden_size=64)
    prompts = random_prompts(model, **KINDS["deep"])
    key_mask = torch.ones(3, 17, dtype=torch.bool)
    key_mask[0, 5:] = False
    logits, _ = token_insertion(model, images(), prompts, key_mask)
    adapted = with_prompts(model, prompts)
    adapted.set_attn_implementation("flex_attention")
    output = adapted(pixel_values=images(), attention_mask=key_mask)
    torch.testing.assert_close(output.logits, logits, rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tokens=st.integers(0, 9),
    kv_prompts=st.integers(0, 7),
    shallow=st.booleans(),
    share=st.booleans(),
    batch_size=st.integers(1, 7),
    heads=st.sampled_from([1, 2, 3]),
    head_size=st.sampled_from([3, 8, 16]),
    layers=st.integers(1, 4),
    patches=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_any_shape_equals_token_insertion(
    tokens, kv_prompts, shallow, share, batch_size, heads, head_size, layers, patches, seed
):
    if tokens + kv_prompts == 0:
        tokens = 1
    model = tiny_vit(
        seed,
        image_size=4 * patches,
        hidden_size=heads * head_size,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        intermediate_size=13,
    ).double()
    prompts = random_prompts(model, tokens, kv_prompts, shallow, share, seed)
    pixel_values = images(batch_size, 4 * patches, seed, torch.float64)
    logits, _ = token_insertion(model, pixel_values, prompts)
    output = with_prompts(model, prompts)(pixel_values=pixel_values)
    torch.testing.assert_close(output.logits, logits, rtol=1e-9, atol=1e-9)


@all_kinds
def test_other_resolutions_equal_token_insertion(kind):
    model = tiny_vit()
    prompts = random_prompts(model, **kind)
    pixel_values = images(size=28)
    logits, _ = token_insertion(model, pixel_values, prompts, interpolate_pos_encoding=True)
    output = with_prompts(model, prompts)(pixel_values=pixel_values, interpolate_pos_encoding=True)
    torch.testing.assert_close(output.logits, logits, rtol=1e-5, atol=1e-5)


@all_kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_weights_equal_token_insertion_to_their_rounding(kind, dtype):
    model = tiny_vit()
    prompts = random_prompts(model, **kind)
    exact, _ = token_insertion(model, images(32), prompts)
    inserted, _ = token_insertion(model.to(dtype), images(32, dtype=dtype), prompts)

    output = with_prompts(model, prompts)(pixel_values=images(32, dtype=dtype))

    assert output.logits.dtype == dtype
    assert rms(output.logits - exact) < 2 * rms(inserted - exact)


@all_kinds
def test_bfloat16_autocast_equals_token_insertion_to_its_rounding(kind):
    model = tiny_vit()
    prompts = random_prompts(model, **kind)
    exact, _ = token_insertion(model, images(32), prompts)
    adapted = with_prompts(model, prompts)

    with torch.autocast("cpu", torch.bfloat16):
        inserted, _ = token_insertion(tiny_vit(), images(32), prompts)
        output = adapted(pixel_values=images(32))

    assert rms(output.logits - exact) < 2 * rms(inserted - exact)


@all_kinds
def test_gradients_equal_those_of_token_insertion(kind):
    model = tiny_vit().double()
    prompts = random_prompts(model, **kind)
    adapted = with_prompts(model, prompts)
    pixel_values = images(dtype=torch.float64)
    adapted(pixel_values=pixel_values).logits.square().sum().backward()

    shared = prompts.keys is prompts.values
    leaves = {}
    for name in ("visual", "keys", "values"):
        if getattr(prompts, name) is not None:
            leaves[name] = getattr(prompts, name).double().requires_grad_()
            setattr(prompts, name, leaves[name])
    if shared and "keys" in leaves:
        prompts.values = prompts.keys
    token_insertion(tiny_vit().double(), pixel_values, prompts)[0].square().sum().backward()

    for index, layer in enumerate(adapted.base_model.model.vit.layers):
        attention = layer.attention
        if "visual" in leaves and index < len(leaves["visual"]):
            actual = attention.e2vpt_visual_prompts["default"].grad
            torch.testing.assert_close(actual, leaves["visual"].grad[index].to(actual.dtype))
        if "keys" in leaves:
            actual, expected = attention.e2vpt_kv_prompts["default"].grad, leaves["keys"].grad[index]
            if not shared:
                expected = torch.stack([expected, leaves["values"].grad[index]])
            torch.testing.assert_close(actual, expected.view_as(actual).to(actual.dtype))


@all_models
@all_kinds
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_result_for_a_sample_does_not_depend_on_its_batch(make, kind, attention):
    model = make(attn_implementation=attention)
    adapted = with_prompts(model, random_prompts(model, **kind))
    batch = images(5)
    together = adapted(pixel_values=batch).logits
    alone = torch.cat([adapted(pixel_values=batch[i : i + 1]).logits for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    others = torch.cat([batch[:1], images(4, seed=9) * 100])
    torch.testing.assert_close(adapted(pixel_values=others).logits[0], together[0], rtol=1e-5, atol=1e-5)


def test_rows_of_a_prefix_stand_in_front_in_every_head_and_sample():
    rows, states = torch.randn(1, 2, 3, 4, dtype=torch.float64), torch.randn(5, 3, 6, 4)
    both = prepend(rows, states)
    assert both.shape == (5, 3, 8, 4) and both.dtype == states.dtype
    assert torch.equal(both[:, :, 2:], states)
    assert torch.equal(both[:, :, :2], rows.float().transpose(1, 2).expand(5, -1, -1, -1))


@pytest.mark.parametrize("samples", [1, 5])
def test_all_that_a_gpu_joins_is_contiguous(samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    joined: list[torch.Tensor] = []
    cat = torch.cat
    monkeypatch.setattr(torch, "cat", lambda parts, dim: joined.extend(parts) or cat(parts, dim))
    states = torch.randn(5, 6, 3 * 4, device="meta").unflatten(-1, (3, 4)).transpose(1, 2)  # as projections give them
    prepend(torch.randn(samples, 2, 3, 4, device="meta"), states)
    assert len(joined) == 2 and all(part.is_contiguous() for part in joined)
