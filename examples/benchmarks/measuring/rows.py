"""Measurements as rows, in files of JSON lines."""

from __future__ import annotations

import json
import platform
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from .timing import Spread


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        measure (`str`): What was measured, such as "inference time".
        model (`str`): The size of the backbone.
        batch_size (`int`): Images in a batch.
        subject (`str`): Of what.
        baseline (`str`): What it is divided by; empty for what is no ratio.
        value, low, high (`float`): Median and quartiles over the rounds.
        rounds (`int`): How many.
        mode (`str`): How the models ran.
    """

    measure: str
    model: str
    batch_size: int
    subject: str
    baseline: str
    value: float
    low: float
    high: float
    rounds: int
    mode: str = "eager"

    @classmethod
    def of(
        cls, measure: str, model: str, batch_size: int, subject: str, baseline: str, found: Spread, mode: str = "eager"
    ) -> Row:
        return cls(measure, model, batch_size, subject, baseline, *found, mode)


def describe_run(device: torch.device, dtype: str, benchmark: str, command: Sequence[str]) -> dict[str, str]:
    """All that one must know to judge and to repeat a measurement."""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{_cpu_name()}, {torch.get_num_threads()} threads"
    return {
        "hardware": hardware,
        "weights": dtype,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "command": shlex.join(["python", "-m", f"examples.benchmarks.{benchmark}", *command]),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def append(path: Path, run: dict[str, str], rows: Iterable[Row]) -> None:
    """Write rows, each with what is known of the run."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({**asdict(row), **run}, ensure_ascii=False) + "\n" for row in rows)


def read(path: Path) -> tuple[list[Row], dict[str, str]]:
    """The rows of a file, of those measured twice the last, and what is known of the last run."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    names = {field.name for field in fields(Row)}
    rows = [row_of(line) for line in lines]
    return latest(rows), {name: value for name, value in lines[-1].items() if name not in names}


def row_of(line: dict[str, Any]) -> Row:
    """The row in what a line of a file says."""
    return Row(**{field.name: line[field.name] for field in fields(Row)})


def latest(rows: Iterable[Row]) -> list[Row]:
    """Of rows that measure the same the last, each where the first stood."""
    found = {(row.measure, row.model, row.mode, row.batch_size, row.subject, row.baseline): row for row in rows}
    return list(found.values())
