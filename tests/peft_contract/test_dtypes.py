"""Backbones in half and double precision, and moving models between types and devices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model

from ..support.models import images, prompt_parameters, tiny_vit
from .common import KINDS, adapted, logits, small_config

HALF = [torch.float16, torch.bfloat16]
every_kind = pytest.mark.parametrize("kind", list(KINDS.values()), ids=list(KINDS))


def dtypes(model: torch.nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for parameter in prompt_parameters(model).values()}


def difference(model: torch.nn.Module, reference: torch.Tensor, dtype: torch.dtype) -> float:
    """Relative to the largest logit."""
    with torch.no_grad():
        output = model(images(dtype=dtype)).logits
    assert output.dtype == dtype
    return ((output.double() - reference.double()).abs().max() / reference.double().abs().max()).item()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("autocast", [True, False])
class TestHalfPrecisionBackbones:
    def test_new_prompts_are_in_single_precision_unless_told_otherwise(
        self, dtype: torch.dtype, autocast: bool
    ) -> None:
        model = get_peft_model(tiny_vit().to(dtype), small_config(), autocast_adapter_dtype=autocast)
        model.add_adapter("other", small_config(), autocast_adapter_dtype=autocast)
        assert dtypes(model) == {torch.float32 if autocast else dtype}
        assert {parameter.dtype for parameter in tiny_vit().to(dtype).parameters()} == {dtype}

    def test_loaded_prompts_too(self, dtype: torch.dtype, autocast: bool, tmp_path: Path) -> None:
        model = adapted()
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_vit().to(dtype), tmp_path, autocast_adapter_dtype=autocast)
        assert dtypes(loaded) == {torch.float32 if autocast else dtype}
        loaded.load_adapter(tmp_path, "other", autocast_adapter_dtype=autocast)
        assert dtypes(loaded) == {torch.float32 if autocast else dtype}
        if autocast:  # nothing was rounded on the way
            saved = prompt_parameters(model)
            assert all(
                torch.equal(value, saved[name])
                for name, value in prompt_parameters(loaded).items()
                if name.endswith("default")
            )

    @every_kind
    def test_the_output_is_that_of_single_precision(self, kind: dict, dtype: torch.dtype, autocast: bool) -> None:
        model = adapted(**kind)
        twin = get_peft_model(tiny_vit().to(dtype), small_config(**kind), autocast_adapter_dtype=autocast).eval()
        twin.load_state_dict(model.state_dict())
        assert difference(twin, logits(model), dtype) < (0.02 if dtype == torch.float16 else 0.1)

    @every_kind
    def test_a_training_step_gives_prompts_gradients_of_their_own_type(
        self, kind: dict, dtype: torch.dtype, autocast: bool
    ) -> None:
        model = get_peft_model(tiny_vit().to(dtype), small_config(**kind), autocast_adapter_dtype=autocast).train()
        model(images(dtype=dtype), labels=torch.tensor([0, 1, 2])).loss.backward()
        for parameter in prompt_parameters(model).values():
            assert parameter.grad is not None and parameter.grad.dtype == parameter.dtype
            assert parameter.grad.isfinite().all() and parameter.grad.any()


@every_kind
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_double_precision_stays_double(kind: dict, implementation: str) -> None:
    model = adapted(tiny_vit(attn_implementation=implementation).double(), **kind)
    assert dtypes(model) == {torch.float64}
    single = adapted(tiny_vit(attn_implementation=implementation), **kind)
    single.load_state_dict(model.state_dict())
    assert difference(model, logits(single), torch.float64) < 1e-5


@every_kind
@pytest.mark.parametrize("dtype", [*HALF, torch.float64])
def test_to_moves_prompts_with_the_model(kind: dict, dtype: torch.dtype) -> None:
    model = adapted(**kind)
    reference = logits(model)
    model.to(dtype)
    assert dtypes(model) == {dtype}
    assert difference(model, reference, dtype) < {torch.float16: 0.02, torch.bfloat16: 0.1, torch.float64: 1e-5}[dtype]
    if dtype == torch.float64:
        model.to(device="cpu", dtype=torch.float32)
        assert torch.equal(logits(model), reference)


def test_an_adapter_added_to_a_moved_model_has_its_type() -> None:
    model = adapted().to(torch.float64)
    model.add_adapter("other", small_config())
    assert dtypes(model) == {torch.float64}


@every_kind
def test_autocast_runs_in_half_precision(kind: dict) -> None:
    model = adapted(**kind)
    reference = logits(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = logits(model)
        loss = model.train()(images(), labels=torch.tensor([0, 1, 2])).loss
    assert output.dtype == torch.bfloat16
    assert (output.float() - reference).abs().max() < 0.1 * reference.abs().max()
    loss.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in prompt_parameters(model).values())


@pytest.mark.gpu
@every_kind
def test_devices(kind: dict, tmp_path: Path) -> None:
    model = adapted(**kind)
    reference = logits(model)
    model.save_pretrained(tmp_path)
    model.to("cuda")
    with torch.no_grad():
        output = model(images().to("cuda")).logits
    torch.testing.assert_close(output.cpu(), reference, atol=1e-3, rtol=1e-3)
    model.add_adapter("other", small_config(**kind))
    assert model.get_model_status().devices == {"default": ["cuda"], "other": ["cuda"]}
    loaded = PeftModel.from_pretrained(tiny_vit().to("cuda"), tmp_path)
    assert loaded.get_model_status().devices == {"default": ["cuda"]}
    assert torch.equal(logits(model.to("cpu")), reference)
