"""Keys and values beside an attention, against the equation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from e2vpt_peft.attention.beside import add_beside

from ..support.adapted import adapt
from ..support.models import BESIDE, images, prompt_parameters, tiny_vit

SHAPE = (2, 6, 5, 8)
"""Of queries: batch size, heads, number, head size."""


def tokens_first(*, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """With tokens before heads in memory, as projections give it."""
    batch_size, heads, number, size = SHAPE
    return torch.randn(batch_size, number, heads, size, dtype=dtype).transpose(1, 2)


def heads_first(*, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(SHAPE, dtype=dtype)


def by_the_equation(
    output: torch.Tensor, query: torch.Tensor, rows: tuple[torch.Tensor, torch.Tensor], scaling: float
) -> torch.Tensor:
    keys, values = (part.expand(len(query), -1, -1, -1) for part in rows)
    scores = scaling * torch.einsum("bhqd,bnhd->bhqn", query, keys)
    return output + torch.einsum("bhqn,bnhd->bhqd", F.gelu(scores), values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("number", [1, 5, 24])
@pytest.mark.parametrize("samples", [1, 2], ids=["shared rows", "rows of each sample"])
@pytest.mark.parametrize("query_as", [tokens_first, heads_first])
@pytest.mark.parametrize("output_as", [tokens_first, heads_first])
@pytest.mark.parametrize("training", [True, False])
def test_what_queries_read_is_added(dtype, number, samples, query_as, output_as, training):
    output, query = output_as(dtype=dtype), query_as(dtype=dtype)
    rows = (torch.randn(samples, number, 6, 8), torch.randn(samples, number, 6, 8))
    expected = by_the_equation(output.double(), query.double(), tuple(part.double() for part in rows), 0.3)
    with torch.set_grad_enabled(training):
        found = add_beside(output, query, rows, 0.3)
    assert found.dtype == dtype
    tolerance = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 6e-2 if dtype == torch.bfloat16 else 1e-2}
    torch.testing.assert_close(found, expected.to(dtype), **tolerance)


@pytest.mark.parametrize("samples", [1, 2], ids=["shared rows", "rows of each sample"])
def test_gradients_are_those_of_the_equation(samples):
    tensors = [
        tokens_first(dtype=torch.float64),
        tokens_first(dtype=torch.float64),
        *torch.randn(2, samples, 5, 6, 8, dtype=torch.float64),
    ]
    for tensor in tensors:
        tensor.requires_grad_()
    weights = torch.randn(SHAPE, dtype=torch.float64)
    found, expected = (
        torch.autograd.grad((way(output, query, tuple(rows), 0.3) * weights).sum(), tensors)
        for way in (add_beside, by_the_equation)
        for output, query, *rows in [tensors]
    )
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_heads_that_share_keys_read_the_same_rows():
    output, query, rows = tokens_first(), tokens_first(), (torch.randn(1, 2, 2, 8), torch.randn(1, 2, 2, 8))
    repeated = tuple(part.repeat_interleave(3, 2) for part in rows)
    expected = by_the_equation(output, query, repeated, 8**-0.5)
    torch.testing.assert_close(add_beside(output, query, rows, None), expected)


@pytest.mark.parametrize("samples", [1, 2], ids=["shared rows", "rows of each sample"])
@torch.no_grad()
def test_the_output_may_have_another_type_than_the_queries(samples):
    output, query = tokens_first(dtype=torch.bfloat16), tokens_first()
    rows = (torch.randn(samples, 5, 6, 8), torch.randn(samples, 5, 6, 8))
    expected = by_the_equation(output.float(), query, rows, 0.3)
    torch.testing.assert_close(add_beside(output, query, rows, 0.3), expected.bfloat16(), rtol=2e-2, atol=6e-2)


@pytest.mark.parametrize("samples", [1, 2], ids=["shared rows", "rows of each sample"])
def test_the_output_is_written_to_but_where_a_gradient_needs_it(samples):
    output, query = tokens_first(), tokens_first()
    before, rows = output.clone(), (torch.randn(samples, 5, 6, 8), torch.randn(samples, 5, 6, 8))
    both = add_beside(output, query, rows, None)
    assert torch.equal(output, before)
    with torch.no_grad():
        assert add_beside(output, query, rows, None).data_ptr() == output.data_ptr()
    torch.testing.assert_close(output, both)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_many_values_of_prompts_beside_the_attention_run_as_one_by_vmap(attention: str) -> None:
    model = adapt(tiny_vit(attn_implementation=attention), num_visual_prompts=0, **BESIDE)
    prompts, pixels = prompt_parameters(model), images()

    def run(values: dict[str, torch.Tensor]) -> torch.Tensor:
        logits: torch.Tensor = functional_call(model, values, (), {"pixel_values": pixels}).logits
        return logits

    many = {name: torch.stack([torch.randn_like(value) for _ in range(3)]) for name, value in prompts.items()}
    one_by_one = [run({name: values[index] for name, values in many.items()}) for index in range(3)]
    torch.testing.assert_close(torch.vmap(run)(many), torch.stack(one_by_one))
