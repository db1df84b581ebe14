from __future__ import annotations

import pytest
import torch
from torch import nn

from e2vpt_peft.utils.non_finite import explain_non_finite, is_finite

BATCH = {"pixel_values": torch.ones(2, 3), "labels": torch.tensor([0, 1]), "name": "flowers"}
NAN = torch.tensor([1.0, float("nan")])


def test_bad_data_is_the_first_suspect_and_is_named():
    model = nn.Linear(2, 2)
    nn.init.constant_(model.bias, float("inf"))
    words = explain_non_finite(model, {**BATCH, "pixel_values": NAN, "boxes": -NAN.log()})
    assert words == "The batch has NaN or infinite values in pixel_values, boxes: look at the data."


def test_then_weights_that_have_overflowed():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    nn.init.constant_(model[1].weight, float("inf"))
    nn.init.constant_(model[1].bias, float("nan"))
    words = explain_non_finite(model, BATCH)
    assert words.startswith("'1.weight' (2 weights) is NaN or infinite already") and "learning rate" in words


def test_else_the_pass_itself_has_overflowed():
    assert "pass has overflowed, as float16 does above 65504" in explain_non_finite(nn.Linear(2, 2), BATCH)


@pytest.mark.parametrize(
    ("value", "finite"),
    [
        (torch.ones(2), True),
        (NAN, False),
        (torch.tensor(float("-inf")), False),
        (torch.tensor([70000.0]).half(), False),
        (torch.tensor([1, 2]), True),
        (torch.empty(0), True),
        (float("nan"), True),  # no tensor
        (None, True),
    ],
)
def test_tensors_alone_can_be_not_finite(value, finite):
    assert is_finite(value) is finite
