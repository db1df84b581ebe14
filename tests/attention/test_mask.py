from __future__ import annotations

import pytest
import torch

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
