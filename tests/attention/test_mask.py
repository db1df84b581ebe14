from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from e2vpt_peft.attention.mask import extend_mask


@pytest.mark.parametrize("position", [0, 2])
def test_masks_are_extended_in_the_layout_of_each_implementation(position):
    states = torch.zeros(2, 5, 8)
    visible = torch.tensor([[True, False], [True, True]])
    columns = list(range(position)) + list(range(position + 2, 7))

    def extended(mask, implementation, visible=None, insert_queries=False):
        return extend_mask(
            mask, 2, states, 5, implementation, visible=visible, position=position, insert_queries=insert_queries
        )

    assert extended(None, "sdpa") is None
    boolean = torch.rand(2, 1, 5, 5) > 0.5
    assert torch.equal(extended(boolean, "sdpa")[..., columns], boolean)
    assert extended(boolean, "sdpa")[..., position : position + 2].all()
    additive = torch.randn(1, 4, 5, 5)
    assert torch.equal(extended(additive, "eager")[..., columns], additive)
    assert (extended(additive, "eager")[..., position : position + 2] == 0).all()
    padding = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    assert torch.equal(extended(padding, "flash_attention_2")[:, columns], padding)

    hidden = extended(None, "sdpa", visible)
    assert hidden.shape == (2, 1, 1, 7)
    assert hidden.dtype == torch.bool
    assert torch.equal(hidden[:, 0, 0, position : position + 2], visible)
    hidden = extended(additive, "eager", visible)
    assert hidden.shape == (2, 4, 5, 7)
    assert (hidden[0, ..., position + 1] == torch.finfo(torch.float32).min).all()
    assert (hidden[1, ..., position + 1] == 0).all()
    hidden = extended(None, "flash_attention_2", visible)
    assert hidden.shape == (2, 7)

    square = extended(boolean, "sdpa", insert_queries=True)
    assert square.shape == (2, 1, 7, 7)
    assert torch.equal(square[:, :, columns][..., columns], boolean)
    assert torch.equal(square[:, :, position], square[:, :, 2 if position == 0 else 0])


STATES = torch.zeros(2, 5, 8)
BIAS = torch.tensor([[0.5, -1.0]])
LOWEST = torch.finfo(torch.float32).min


def biased(mask, implementation="sdpa", position=0, **kwargs):
    return extend_mask(mask, 2, STATES, 5, implementation, bias=BIAS, position=position, **kwargs)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_bias_without_a_mask_makes_an_additive_one(implementation):
    assert biased(None, implementation).tolist() == [[[[0.5, -1.0, 0, 0, 0, 0, 0]]]]
    assert biased(None, implementation, position=2).tolist() == [[[[0, 0, 0.5, -1.0, 0, 0, 0]]]]


def test_a_bias_beside_an_additive_mask_is_added_to_nothing_else():
    mask = torch.randn(1, 4, 5, 5)
    extended = biased(mask, "eager")
    assert torch.equal(extended[..., 2:], mask)
    assert torch.equal(extended[..., :2], BIAS.expand(1, 4, 5, 2))


def test_a_bias_makes_a_boolean_mask_additive():
    mask = torch.rand(2, 1, 5, 5, generator=torch.Generator().manual_seed(0)) > 0.5
    extended = biased(mask)
    assert extended.dtype == STATES.dtype
    assert torch.equal(extended[..., 2:], torch.where(mask, 0.0, LOWEST))
    assert torch.equal(extended[..., :2], BIAS.expand(2, 1, 5, 2))


def test_a_bias_brings_nothing_hidden_back():
    """Each sample sees its own of the new keys, with what is added to those."""
    visible = torch.tensor([[True, False], [True, True]])
    extended = biased(None, visible=visible)
    assert extended[:, 0, 0, :2].tolist() == [[0.5, LOWEST], [0.5, -1.0]]


def test_a_bias_has_gradients_and_the_queries_that_come_with_it_see_it():
    bias = torch.zeros(1, 2, requires_grad=True)
    mask = torch.zeros(2, 1, 5, 5)
    extended = extend_mask(mask, 2, STATES, 5, "eager", bias=bias, position=1, insert_queries=True)
    assert extended.shape == (2, 1, 7, 7)
    extended.sum().backward()
    assert bias.grad.tolist() == [[14.0, 14.0]]


@pytest.mark.parametrize("implementation", ["flex_attention", "flash_attention_2", "flash_attention_3"])
@pytest.mark.parametrize("mask", [None, torch.ones(2, 5)])
def test_implementations_that_take_no_bias_refuse_it(implementation, mask):
    with pytest.raises(ValueError, match=f"'{implementation}' takes no bias.*'attention_gate'.*'sdpa'.*'eager'"):
        biased(mask, implementation)


def test_block_masks_have_room_for_new_keys_and_queries():
    mask = create_block_mask(lambda batch, head, query, key: key <= query, 2, None, 5, 5, device="cpu")
    visible = torch.tensor([[True, False], [True, True]])
    extended = extend_mask(mask, 2, STATES, 5, "flex_attention", visible=visible, position=1, insert_queries=True)
    dense = create_mask(extended.mask_mod, 2, 1, 7, 7, device="cpu")[:, 0]
    old = [0, 3, 4, 5, 6]
    assert torch.equal(dense[:, old][:, :, old], torch.ones(2, 5, 5).tril().bool())
    assert torch.equal(dense[:, :, 1:3], visible[:, None].expand(2, 7, 2))
    assert torch.equal(dense[:, 1:3], dense[:, :1].expand(2, 2, 7)), "new queries see what the first one sees"


def test_no_block_mask_and_nothing_hidden_is_no_mask():
    assert extend_mask(None, 2, STATES, 5, "flex_attention") is None
    hidden = extend_mask(None, 2, STATES, 5, "flex_attention", visible=torch.tensor([[True, False]] * 2))
    dense = create_mask(hidden.mask_mod, 2, 1, 5, 7, device="cpu")
    assert dense[..., 1].sum() == 0 and dense.sum() == 2 * 5 * 6
