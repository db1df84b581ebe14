from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from e2vpt_peft.utils.seen import Seen, can_be_seen, is_plain, place_of


def seen_tensor(tensor: torch.Tensor) -> Seen:
    return Seen([({"tensor": tensor}.get, "tensor")])


SHAPES = [(5,), (10, 384), (2, 6, 5, 64), (768, 768)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_untouched_tensor_is_still_what_it_was(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = nn.Parameter(torch.randn(shape, dtype=dtype))
    tensor.data[..., 0] = float("nan")
    seen = seen_tensor(tensor)
    assert seen.is_still()
    with torch.inference_mode():
        assert seen.is_still()


def test_a_single_number_is_seen_by_its_version() -> None:
    scale = nn.Parameter(torch.tensor(2.0))
    seen = seen_tensor(scale)
    assert seen.is_still()
    with torch.no_grad():
        scale.mul_(2)
    assert not seen.is_still()


def add(tensor: torch.Tensor) -> None:
    with torch.no_grad():
        tensor[..., -1:] += 1


def add_in_inference_mode(tensor: torch.Tensor) -> None:
    with torch.inference_mode():
        tensor[..., -1:] += 1


def add_through_data(tensor: torch.Tensor) -> None:
    tensor.data += 1


def set_data(tensor: torch.Tensor) -> None:
    tensor.data = tensor.data.clone()


@pytest.mark.parametrize("change", [add, add_in_inference_mode, add_through_data, set_data])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_changed_tensor_is_not(change: Callable[[torch.Tensor], None], shape: tuple[int, ...]) -> None:
    tensor = nn.Parameter(torch.randn(shape))
    seen = seen_tensor(tensor)
    change(tensor)
    assert not seen.is_still()


@pytest.mark.parametrize(
    "other",
    [lambda tensor: tensor.clone(), lambda tensor: tensor.detach(), lambda tensor: None],
    ids=["equal", "of the same memory", "none"],
)
def test_another_tensor_in_its_place_is_noticed(other: Callable[[torch.Tensor], Any]) -> None:
    place = {"prompts": torch.randn(3, 8)}
    seen = Seen([(place.get, "prompts")])
    place["prompts"] = other(place["prompts"])
    assert not seen.is_still()


@pytest.mark.parametrize("inference", [False, True])
def test_memory_that_was_made_in_inference_mode_is_noticed(inference: bool) -> None:
    tensor = nn.Parameter(torch.randn(3, 8))
    seen = seen_tensor(tensor)
    with torch.inference_mode(inference):
        tensor.data = torch.randn(3, 8)
    assert not seen.is_still()


def test_something_in_an_empty_place_is_noticed() -> None:
    containers = nn.ParameterDict()
    seen = Seen([place_of(containers, "default", "_parameters")])
    assert seen.is_still()
    containers["default"] = torch.zeros(2)
    assert not seen.is_still()


def test_a_module_that_a_wrapper_forwards_to_is_found_again() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = nn.ModuleDict({"norm": nn.LayerNorm(8)})

        def __getattr__(self, name: str) -> Any:
            return self.inside["norm"] if name == "norm" else super().__getattr__(name)

    wrapper = Wrapper()
    seen = Seen([place_of(wrapper, "norm")])
    assert seen.is_still()
    wrapper.inside["norm"] = nn.LayerNorm(8)
    assert not seen.is_still()


def test_a_computed_parameter_is_another_one_each_time() -> None:
    containers = nn.ParameterDict({"default": torch.ones(2, 2)})
    nn.utils.parametrize.register_parametrization(containers, "default", nn.ReLU())
    assert not Seen([place_of(containers, "default", "_parameters")]).is_still()


def test_a_tensor_in_another_order_of_memory_is_looked_at() -> None:
    tensor = nn.Parameter(torch.randn(400, 300).T)
    seen = seen_tensor(tensor)
    assert seen.is_still()
    tensor.data *= 2
    assert not seen.is_still()


@pytest.mark.parametrize("count", [1, 10, 100, 200])
@pytest.mark.parametrize("hidden_size", [192, 384, 768, 1024, 1280])
def test_each_prompt_and_each_segment_is_looked_at(count: int, hidden_size: int) -> None:
    tensor = nn.Parameter(torch.randn(count, hidden_size))
    prompts = [(prompt,) for prompt in range(count)]
    segments = [(slice(None), slice(segment, None, 16)) for segment in range(16)]
    for place in prompts + segments:
        seen = seen_tensor(tensor)
        tensor.data[place] *= 2
        assert not seen.is_still(), place


@pytest.mark.parametrize("count", [1, 5, 50])
@pytest.mark.parametrize("heads", [3, 6, 12, 16])
def test_each_key_value_prompt_is_looked_at_in_each_head(count: int, heads: int) -> None:
    tensor = nn.Parameter(torch.randn(heads, count, 64))
    for head in range(heads):
        seen = seen_tensor(tensor)
        tensor.data[head] *= 2
        assert not seen.is_still(), head
    for prompt in range(count):
        seen = seen_tensor(tensor)
        tensor.data[:, prompt] *= 2
        assert not seen.is_still(), prompt


@pytest.mark.parametrize(("hidden_size", "head_size"), [(192, 64), (384, 64), (768, 64), (1024, 64), (1280, 80)])
def test_each_head_of_a_projection_is_looked_at(hidden_size: int, head_size: int) -> None:
    projection = nn.Linear(hidden_size, hidden_size)
    for start in range(0, hidden_size, head_size):
        for place in ((slice(start, start + head_size),), (slice(None), slice(start, start + head_size))):
            seen = Seen(modules=[projection])
            projection.weight.data[place] *= 2
            assert not seen.is_still(), (start, place)


def replace_forward(module: Any) -> None:
    module.forward = lambda states: states


def remove_bias(module: Any) -> None:
    module.bias = None


def change_weight(module: Any) -> None:
    with torch.no_grad():
        module.weight *= 2


def compute_weight(module: Any) -> None:
    nn.utils.parametrizations.spectral_norm(module)


def subclass(module: Any) -> None:
    module.__class__ = type("LayerNorm", (type(module),), {})


def put_parts_in(module: Any) -> None:
    module.part = nn.Linear(2, 2)


@pytest.mark.parametrize("make", [lambda: nn.LayerNorm(8), lambda: nn.Linear(8, 8)], ids=["norm", "linear"])
@pytest.mark.parametrize(
    "change", [replace_forward, remove_bias, change_weight, compute_weight, subclass, put_parts_in]
)
def test_a_module_that_would_compute_something_else_is_not_still_the_same(
    make: Callable[[], nn.Module], change: Callable[[Any], None]
) -> None:
    module = make()
    seen = Seen(modules=[module])
    assert seen.is_still()
    change(module)
    assert not seen.is_still()


@pytest.mark.parametrize(("make", "name"), [(nn.LayerNorm, "eps"), (Qwen2RMSNorm, "variance_epsilon")])
def test_another_eps_is_noticed(make: Callable[[int], nn.Module], name: str) -> None:
    module = make(8)
    seen = Seen(modules=[module])
    assert seen.is_still()
    setattr(module, name, 0.5)
    assert not seen.is_still()


def test_only_what_depends_on_nothing_else_is_plain() -> None:
    assert is_plain(nn.LayerNorm(8))
    assert is_plain(nn.LayerNorm(8, elementwise_affine=False))
    assert is_plain(nn.Identity())
    assert not is_plain(nn.BatchNorm1d(8))
    assert not is_plain(nn.Sequential(nn.Linear(2, 2)))
    assert not is_plain(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    with pytest.warns(FutureWarning):
        old = torch.nn.utils.weight_norm(nn.Linear(2, 2))
    assert not is_plain(old)


def test_tensors_with_ways_of_their_own_cannot_be_seen() -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        assert not can_be_seen(torch.empty(2))
    with torch.inference_mode():
        assert not can_be_seen(torch.empty(2))
    assert can_be_seen(nn.Parameter(torch.empty(2)))
    assert can_be_seen(None)
