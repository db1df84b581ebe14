from __future__ import annotations

import pytest
from torch import nn

from e2vpt_peft.utils.modes import evaluating


@pytest.fixture
def model():
    """In training, but for one part."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.Linear(2, 2))).train()
    model[1][0].eval()
    return model


def modes(model):
    return [module.training for module in model.modules()]


def test_all_of_it_evaluates_and_every_part_is_as_it_was_afterwards(model):
    before = modes(model)
    with evaluating(model):
        assert not any(modes(model))
    assert modes(model) == before == [True, True, True, False, True]


def test_also_after_an_error(model):
    before = modes(model)
    with pytest.raises(ZeroDivisionError), evaluating(model):
        _ = 1 / 0
    assert modes(model) == before
