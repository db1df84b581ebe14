"""A case: one check or one measurement, and the machine that it runs on."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import ViTForImageClassification

from ..measuring.calls import Call
from ..measuring.methods import build_backbone
from ..measuring.rows import Row
from ..measuring.setup import SIZES, Prompts, Setup
from ..measuring.timing import time_side_by_side

Facts = dict[str, Any]


class NotHere(Exception):
    """A case needs what this machine does not have. It has neither passed nor failed."""


@dataclass(frozen=True)
class Options:
    """What the command line says.

    Attributes:
        folder (`Path`): Where everything is written.
        device (`str`): What runs the cases.
        toy (`bool`): Whether the models are tiny, to try the cases rather than to measure.
        minutes (`float`): The time there is.
        only (`list[str]`): Names of cases, or beginnings of names; all if empty.
        data_dir, model (`str`, *optional*): For the accuracy suite.
    """

    folder: Path
    device: str
    toy: bool
    minutes: float
    only: tuple[str, ...] = ()
    data_dir: str | None = None
    model: str | None = None


class Machine:
    """Where cases run.

    Args:
        options (`Options`): What the command line says.
        deadline (`float`): When to stop, as `time.time()` counts.
    """

    def __init__(self, options: Options, deadline: float) -> None:
        self.options, self.deadline = options, deadline
        self.device = torch.device(options.device)
        self.toy = options.toy
        self.prompts = Prompts(3, 2) if self.toy else Prompts(10, 5)
        self.many_prompts = Prompts(8, 2) if self.toy else Prompts(100, 5)

    @functools.cached_property
    def setup(self) -> Setup:
        """What numbers are measured on: ViT-B/16 in bfloat16."""
        return Setup(SIZES["toy" if self.toy else "ViT-B/16"], self.device, torch.bfloat16)

    def small(self, dtype: torch.dtype) -> Setup:
        """What results are checked on: heads as large as any, and quick."""
        return Setup(SIZES["toy" if self.toy else "ViT-S/16"], self.device, dtype)

    @functools.cached_property
    def backbone(self) -> ViTForImageClassification:
        return build_backbone(self.setup)

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.time()

    def time(self, calls: dict[str, Call], least_seconds: float = 0.02) -> dict[str, list[float]]:
        """Side by side, for some seconds at the most; see [`~measuring.timing.time_side_by_side`]."""
        if self.toy:
            return time_side_by_side(calls, self.device, rounds=2, seconds=0, least_seconds=0)
        return time_side_by_side(calls, self.device, rounds=50, seconds=6, least_seconds=least_seconds)


@dataclass(frozen=True)
class Case:
    """A check or a measurement.

    Attributes:
        name (`str`): By which it is known in the file of results.
        run (`Callable`): Returns rows of numbers, or facts by name; raises if a check fails.
        seconds (`float`): About how long it takes on an H100. It does not start with less time.
    """

    name: str
    run: Callable[[Machine], list[Row] | Facts]
    seconds: float
