"""What was tried on top of key-value prompts beside the attention, on the validation images of some tasks.

    python -m examples.benchmarks.additions --data_dir DATA --model dinov2-small-focus --image_size 112 \\
        --precision bfloat16 --attention eager --tasks caltech101 gtsrb aid pacs_sketch --out additions.jsonl

Each is trained once for each task and rate, on 800 images, by the recipe `modern` of `compare.py`, and judged on 200:
the test images are not used. Each training is a line of the file `--out`; the same command goes on where it was
killed. The table at the end has the percentage of images that are classified correctly.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import HfArgumentParser

from .accuracy.additions import ADDITIONS, Addition
from .accuracy.engines import set_up
from .accuracy.recipes import Plan
from .accuracy.records import Record, Store
from .accuracy.steps import PRECISIONS, Step
from .accuracy.tables import as_table
from .accuracy.tasks import SUITES, select, suite
from .accuracy.trials import Trainings, Trial

NAMES = [addition.method.name for addition in ADDITIONS]


@dataclass
class Arguments:
    """Options, those of `compare.py` where they have the same name."""

    out: str = field(metadata={"help": "File of results, JSON lines. What it has is not run again."})
    model: str = field(metadata={"help": "Backbone: a Hub id or a folder."})
    suite: str = field(default="photos", metadata={"help": f"Tasks: {', '.join(SUITES)}."})
    data_dir: str | None = field(default=None, metadata={"help": "Folder with a folder for each task."})
    tasks: list[str] | None = field(default=None, metadata={"help": "Only these tasks of the suite."})
    additions: list[str] | None = field(default=None, metadata={"help": f"Only these of {', '.join(NAMES)}."})
    learning_rate: float = field(default=1e-2, metadata={"help": "Of all that is trained."})
    seed: int = field(default=0, metadata={"help": "Of the prompts, the head and the order of images."})
    image_size: int | None = field(default=None, metadata={"help": "Height and width of the input."})
    precision: str = field(default="float32", metadata={"help": f"{', '.join(PRECISIONS)}."})
    attention: str | None = field(default=None, metadata={"help": "transformers' attn_implementation."})
    epochs: int = field(default=10, metadata={"help": "Epochs of every training."})
    batch_size: int = field(default=16, metadata={"help": "Images per step."})
    device: str = field(default="cpu", metadata={"help": "Where to train."})
    threads: int = field(default=1, metadata={"help": "CPU threads."})

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision!r} must be one of {', '.join(PRECISIONS)}.")
        if unknown := sorted(set(self.additions or []) - set(NAMES)):
            raise ValueError(f"additions has {unknown}, but must be among {', '.join(NAMES)}.")


def measure(addition: Addition, trial: Trial, trainings: Trainings) -> Record:
    """Train once, and evaluate."""

    def step_of(model: nn.Module, optimizer: torch.optim.Optimizer, precision: str, batch_size: int) -> Step:
        return addition.step(model, optimizer, precision)

    return trainings.measure(trial.method, trial.part, trainings.optimisation(trial), trial.rates, step_of=step_of)


def table(records: list[Record], tasks: list[str]) -> str:
    """Percent, a row for each addition."""
    found = {(record["settings"]["method"], record["settings"]["task"]): record["accuracy"] for record in records}
    rows = [["", *tasks]]
    for name in dict.fromkeys(name for name, _ in found):
        rows.append([name, *(f"{100 * found[name, task]:.1f}" for task in tasks)])
    return as_table(rows)


def main(argv: list[str] | None = None) -> list[Record]:
    """Run what is not yet in the file, and print the table; the records."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(argv)  # type: ignore[arg-type]
    set_up(args.threads, args.precision)
    plan = Plan(
        args.model,
        args.data_dir,
        "modern",
        args.epochs,
        args.batch_size,
        (args.seed,),
        args.device,
        image_size=args.image_size,
        precision=args.precision,
        attention=args.attention,
    )
    tasks = select(suite(args.suite, args.data_dir), args.tasks, [])
    chosen = [addition for addition in ADDITIONS if addition.method.name in (args.additions or NAMES)]
    store, records = Store(Path(args.out)), []
    for task in tasks:
        trainings = Trainings(task, plan)
        for addition in chosen:
            how = (args.learning_rate, 1e-4, args.seed, addition.rates, args.epochs)
            trial = Trial(addition.method, "validation", *how)
            record = store.once(trainings.settings(trial), partial(measure, addition, trial, trainings))
            print(f"{task.name}, {addition.method.name}: {record['accuracy']:.1%}", flush=True)
            records.append(record)
    print(table(records, [task.name for task in tasks]))
    return records


if __name__ == "__main__":
    main(sys.argv[1:])
