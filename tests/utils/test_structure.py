from __future__ import annotations

from typing import Any

import torch
from torch import nn

from e2vpt_peft.utils.structure import Structure


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.ModuleDict({"a": nn.Linear(2, 2)}))


class Part:
    def __init__(self) -> None:
        self.sources = {0: "a"}


def change(module: Any, part: Part) -> None:
    """In every way that putting an adapter into a model does."""
    module[0] = nn.Sequential(module[0])
    module[2]["b"] = nn.Linear(2, 2)
    module.__class__ = type("Other", (nn.Sequential,), {})
    module.config = "other"
    module.names.append("other")
    module[1].train(False)
    module[1].weight.requires_grad_(False)
    module[1].register_forward_hook(lambda *_: None)
    module[1].bias = nn.Parameter(torch.ones(2))
    module[1].register_buffer("mask", torch.ones(2))
    del module[2].marker
    part.sources[1] = "b"


def looks(module: Any, part: Part) -> Any:
    return (
        type(module),
        [(name, id(one), one.training, len(one._forward_hooks)) for name, one in module.named_modules()],
        [(name, id(one), one.requires_grad) for name, one in module.named_parameters()],
        [(name, id(one)) for name, one in module.named_buffers()],
        module.config,
        (id(module.names), list(module.names)),
        module[2].marker,
        (id(part.sources), dict(part.sources)),
    )


def test_everything_is_put_back_in_the_same_objects() -> None:
    module, part = model(), Part()
    module.config, module.names, module[2].marker = "mine", ["mine"], 1
    before = looks(module, part)
    structure = Structure(module, [part])
    change(module, part)
    structure.restore()
    assert looks(module, part) == before
    change(module, part)
    structure.restore()  # once more
    assert looks(module, part) == before
    module[1](torch.ones(3, 2))


def test_values_stay_as_they_are() -> None:
    module = model()
    structure = Structure(module)
    with torch.no_grad():
        module[0].weight.fill_(7)
    structure.restore()
    assert (module[0].weight == 7).all()
