"""Heads for which PyTorch's compiled flex attention is wrong on CPUs with AVX2 and no AVX-512."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._inductor.config
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

from e2vpt_peft.attention import flex
from e2vpt_peft.attention.flex import avoid_faulty_head_size

from ..support import flex as support
from ..support.flex import fault_of_torch, skip_where_torch_is_wrong, states
from ..support.models import images, tiny_vit
from ..support.prompted import with_prompts
from ..support.reference import random_prompts, token_insertion

HEADS = 4
small_heads = pytest.mark.parametrize("head_size", [8, 16])


@pytest.fixture
def package_sees_avx2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "CPU_CAPABILITY", "AVX2")


@pytest.fixture
def torch_compiles_for_avx2() -> Iterator[None]:
    skip_where_torch_is_wrong()
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("this CPU has no AVX2")
    torch._dynamo.reset()
    with torch._inductor.config.patch({"cpp.simdlen": 256}):
        yield
    torch._dynamo.reset()


@pytest.mark.slow  # compiles
@small_heads
@pytest.mark.usefixtures("torch_compiles_for_avx2")
def test_the_check_of_torch_sees_its_fault(head_size: int) -> None:
    fault = fault_of_torch(head_size)
    if fault is None:
        pytest.skip(f"torch {torch.__version__} is right with heads of {head_size}: it needs no widening any more")
    assert f"heads of {head_size}" in fault


@pytest.mark.slow
@pytest.mark.parametrize(("head_size", "scaling"), [(8, None), (16, 0.7)])
@pytest.mark.usefixtures("torch_compiles_for_avx2", "package_sees_avx2")
@torch.no_grad()
def test_widened_heads_give_the_same_attention(head_size: int, scaling: Any) -> None:
    query, key, value = (states(24, head_size) for _ in range(3))
    wide_query, wide_key, scale = avoid_faulty_head_size(query, key, scaling)
    actual = torch.compile(flex_attention)(wide_query, wide_key, value, scale=scale)
    torch.testing.assert_close(actual, F.scaled_dot_product_attention(query, key, value, scale=scaling))


@pytest.mark.slow
@pytest.mark.parametrize(("head_size", "shallow"), [(8, False), (16, True)], ids=["8, deep", "16, shallow"])
@pytest.mark.usefixtures("torch_compiles_for_avx2", "package_sees_avx2")
@torch.no_grad()
def test_a_model_equals_token_insertion(head_size: int, shallow: bool) -> None:
    model = tiny_vit(hidden_size=HEADS * head_size)
    prompts = random_prompts(model, tokens=4, kv_prompts=3, shallow=shallow)  # 24 keys with the 17 of the image
    logits, _ = token_insertion(model, images(), prompts)
    adapted = with_prompts(model, prompts)
    adapted.set_attn_implementation("flex_attention")
    torch.testing.assert_close(adapted(pixel_values=images()).logits, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    ("capability", "head_size", "expected"),
    [("AVX2", 8, 32), ("AVX2", 16, 32), ("AVX2", 12, 12), ("AVX2", 24, 24), ("AVX512", 16, 16), ("SVE256", 8, 8)],
)
@pytest.mark.parametrize("masked", [False, True], ids=["all tokens", "masked"])
@torch.no_grad()
def test_which_heads_are_widened(
    capability: str, head_size: int, expected: int, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = set()

    def uncompiled(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, training: bool, **kwargs: Any) -> Any:
        sizes.add((query.shape[-1], key.shape[-1], value.shape[-1]))
        return flex_attention(query, key, value, **kwargs)

    monkeypatch.setattr("transformers.integrations.flex_attention.compile_friendly_flex_attention", uncompiled)
    monkeypatch.setattr(flex, "CPU_CAPABILITY", capability)
    model = tiny_vit(hidden_size=HEADS * head_size)
    prompts = random_prompts(model, tokens=4, kv_prompts=3)
    key_mask = None
    if masked:
        key_mask = torch.ones(3, 17, dtype=torch.bool)
        key_mask[0, 5:] = False
    logits, _ = token_insertion(model, images(), prompts, key_mask)
    adapted = with_prompts(model, prompts)
    adapted.set_attn_implementation("flex_attention")
    output = adapted(pixel_values=images(), attention_mask=key_mask)
    torch.testing.assert_close(output.logits, logits, rtol=1e-5, atol=1e-5)
    assert sizes == {(expected, expected, head_size)}


@pytest.mark.usefixtures("package_sees_avx2")
def test_other_devices_are_left_alone() -> None:
    query, key = torch.empty(1, 2, 5, 8, device="meta"), torch.empty(1, 2, 24, 8, device="meta")
    assert avoid_faulty_head_size(query, key, None) == (query, key, None)


def test_flex_tests_are_skipped_where_torch_is_wrong_and_only_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "fault_on_this_cpu", lambda: None)
    skip_where_torch_is_wrong()
    monkeypatch.setattr(support, "fault_on_this_cpu", lambda: "wrong by itself")
    with pytest.raises(pytest.skip.Exception, match="wrong by itself"):
        skip_where_torch_is_wrong()
