"""Accuracy of methods on tasks, over seeds.

    python -m examples.benchmarks.compare --data_dir DATA --out results/mini.jsonl         # all methods on `mini`
    python -m examples.benchmarks.compare --compare components --out results/parts.jsonl   # one of the ablations
    python -m examples.benchmarks.compare --suite photos --data_dir PHOTOS --recipe modern --epochs 20 \\
        --model dinov2-small-focus --image_size 84 --batch_size 16 --out results/photos.jsonl
    python -m examples.benchmarks.compare --suite vtab --data_dir VTAB --recipe paper --epochs 100 \\
        --seeds 42 44 82 100 800 --model google/vit-base-patch16-224-in21k --out results/vtab.jsonl

Each method searches as many learning rates, on the validation images of each task. With the best one it is trained on
all training images, once for each seed, and the test images are used once. Each training is a line of the file
`--out`. The same command goes on where it was killed. `--shard 0/2` and `--shard 1/2` split the work between two
machines, `--processes` within one. With `--engine`, processes share out not tasks but trainings, on one machine or on
a cluster, and poor ones can be stopped early.
`report.py` makes tables and plots of the files.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser

from examples.data_and_backbone import BACKBONE

from .accuracy.ablations import ABLATIONS
from .accuracy.checkpoints import Checkpoints
from .accuracy.engines import ENGINES, Workers, set_up, start
from .accuracy.methods import Method, choose
from .accuracy.protocol import Bench, Engine, split_work
from .accuracy.recipes import RECIPES, Plan
from .accuracy.records import Record, Store, key
from .accuracy.steps import PRECISIONS
from .accuracy.tasks import SUITES, Task, select, suite


@dataclass
class Arguments:
    """Options of the comparison."""

    out: str = field(metadata={"help": "File of results, JSON lines. What it has is not run again."})
    suite: str = field(default="mini", metadata={"help": f"Tasks: {', '.join(SUITES)}."})
    data_dir: str | None = field(default=None, metadata={"help": "Folder with a folder for each task."})
    tasks: list[str] | None = field(default=None, metadata={"help": "Only these tasks of the suite."})
    leave_out: list[str] = field(
        default_factory=list, metadata={"help": "Not these, for example the one the backbone was pretrained on."}
    )
    compare: str = field(default="methods", metadata={"help": f"What to compare: {', '.join(ABLATIONS)}."})
    methods: list[str] | None = field(default=None, metadata={"help": "Only these, by the names in the tables."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Of the final trainings."})
    model: str = field(default=BACKBONE, metadata={"help": "Backbone: a Hub id or a folder."})
    recipe: str = field(
        default="quick",
        metadata={
            "help": (
                "quick: AdamW, five learning rates around each method's own, four candidates for pruning. modern: "
                "AdamW, six trials by successive halving, the length is searched, too, and images are normalised as "
                "in pretraining. paper: SGD, ten learning rates by four weight decays, 81 candidates."
            )
        },
    )
    factors: list[float] = field(
        default_factory=list,
        metadata={"help": "Other learning rates than the recipe's, as multiples of each method's own."},
    )
    search_epochs: list[int] = field(
        default_factory=list,
        metadata={
            "help": (
                "Other lengths of the trainings of the search than the recipe's: all have the fewest epochs, the "
                "better third the next, and so on."
            )
        },
    )
    image_size: int | None = field(
        default=None,
        metadata={"help": "Height and width of the input, if not the backbone's own: positions are resized to it."},
    )
    precision: str = field(
        default="auto", metadata={"help": f"{', '.join(PRECISIONS)}, or auto: bfloat16 on a GPU, float32 on a CPU."}
    )
    attention: str | None = field(
        default=None,
        metadata={"help": "transformers' attn_implementation. On a CPU, eager trains short sequences faster."},
    )
    epochs: int = field(default=50, metadata={"help": "Epochs of every training."})
    batch_size: int = field(default=64, metadata={"help": "Images per step."})
    device: str = field(default="auto", metadata={"help": "cpu, cuda, or auto: cuda if there is one."})
    shard: str = field(default="0/1", metadata={"help": "i/n: the i-th of n parts of the work, counted from 0."})
    processes: int = field(
        default=1,
        metadata={"help": "Processes on this machine; with an engine, trainings at a time, wherever they run."},
    )
    threads: int = field(default=1, metadata={"help": "CPU threads of each process."})
    engine: str | None = field(
        default=None, metadata={"help": "Processes share out trainings, not tasks: ray, or optuna on one machine."}
    )
    address: str | None = field(
        default=None, metadata={"help": "Of a Ray cluster, or auto for the one this machine is in."}
    )
    gpus_per_training: float | None = field(
        default=None, metadata={"help": "With Ray, the part of a GPU that each gets; default: all of one, on cuda."}
    )
    grace_epochs: int | None = field(
        default=None,
        metadata={
            "help": (
                "With an engine: after so many epochs, three times as many, and so on, the poorer two thirds of the "
                "trainings of a search are stopped (ASHA). Default: none is."
            )
        },
    )
    checkpoint_seconds: float = field(
        default=60,
        metadata={"help": "How often to write the state of a training, from which it goes on after a kill."},
    )

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("compare", self.compare, ABLATIONS),
            ("recipe", self.recipe, RECIPES),
            ("engine", self.engine, [None, *ENGINES]),
            ("precision", self.precision, ["auto", *PRECISIONS]),
        ):
            if value not in allowed:
                raise ValueError(f"{name}={value!r} must be one of {', '.join(filter(None, allowed))}.")
        if not self.seeds:
            raise ValueError("seeds is empty: give at least one.")
        if self.factors and not RECIPES[self.recipe].factors:
            raise ValueError(
                f"factors={self.factors} cannot be given with recipe={self.recipe!r}: its rates are fixed."
            )
        if any(not 1 <= epochs <= self.epochs for epochs in self.search_epochs):
            raise ValueError(f"search_epochs={self.search_epochs} must be from 1 to {self.epochs}, which is epochs.")
        if self.processes < 1:
            raise ValueError(f"processes={self.processes} must be 1 or more.")
        for name in ("address", "gpus_per_training"):
            if getattr(self, name) is not None and self.engine != "ray":
                raise ValueError(f"{name}={getattr(self, name)!r} needs engine='ray', but engine={self.engine!r}.")
        if self.grace_epochs is not None:
            if self.engine is None:
                raise ValueError(f"grace_epochs={self.grace_epochs} needs an engine: {', '.join(ENGINES)}.")
            if not 1 <= self.grace_epochs < self.epochs:
                raise ValueError(
                    f"grace_epochs={self.grace_epochs} must be from 1 to {self.epochs - 1}, one less than epochs."
                )
            if self.search_epochs or len(RECIPES[self.recipe].lengths) > 1:
                raise ValueError(f"grace_epochs={self.grace_epochs} cannot be given with a search by lengths.")


def parse_shard(text: str) -> tuple[int, int]:
    """`i/n` as two numbers."""
    try:
        index, number = map(int, text.split("/"))
    except ValueError:
        raise ValueError(f"shard={text!r} must be two numbers, as in 0/2.") from None
    return index, number


def cells_of(tasks: list[Task], methods: list[Method]) -> list[tuple[Task, list[Method]]]:
    """What one process does at a time: a task, and the methods that share a search."""
    shared: dict[str, list[Method]] = {}
    for method in methods:
        shared.setdefault(method.searched_as, []).append(method)
    return [(task, together) for task in tasks for together in shared.values()]


def run_cell(
    task: Task,
    methods: list[Method],
    plan: Plan,
    out: Path,
    threads: int,
    checkpoint_seconds: float,
    engine: Engine | None = None,
) -> list[Record]:
    """All trainings of a cell, in this or in a process of its own. Returns the final records."""
    set_up(threads, plan.precision)
    what = key({"task": task.name, "method": methods[0].searched_as, **plan.settings})
    folder = out.with_name(f"{out.name}.unfinished-{task.name}-{hashlib.sha256(what.encode()).hexdigest()[:8]}")
    checkpoints = Checkpoints(folder, checkpoint_seconds)
    shared = any(method.pruning for method in methods)
    bench = Bench(task, plan, Store(out), checkpoints, shared, engine)
    found = [record for method in methods for record in bench.run(method)]
    checkpoints.clear()
    return found


def show(records: list[Record], done: int, total: int) -> None:
    for record in records:
        settings = record["settings"]
        place = f"{settings['task']}, {settings['method']}, seed {settings['seed']}"
        print(
            f"[{done}/{total}] {place}: {record['accuracy']:.1%}, learning rate {settings['learning_rate']:g}",
            flush=True,
        )


def main(argv: list[str] | None = None) -> list[Record]:
    """Run what is not yet in the file; the final records of this shard."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(argv)  # type: ignore[arg-type]
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    plan = Plan(
        args.model,
        args.data_dir,
        args.recipe,
        args.epochs,
        args.batch_size,
        tuple(args.seeds),
        device,
        args.grace_epochs,
        args.image_size,
        args.precision if args.precision != "auto" else "bfloat16" if device == "cuda" else "float32",
        args.attention,
        tuple(args.factors),
        tuple(args.search_epochs),
    )
    tasks = select(suite(args.suite, args.data_dir), args.tasks, args.leave_out)
    methods = choose(ABLATIONS[args.compare], args.methods)
    cells = split_work(cells_of(tasks, methods), parse_shard(args.shard))
    common = (plan, Path(args.out), args.threads, args.checkpoint_seconds)
    results: list[Record] = []
    if args.processes == 1 or args.engine:
        gpus = args.gpus_per_training if args.gpus_per_training is not None else float(device == "cuda")
        with start(args.engine, Workers(args.processes, args.threads, args.address, gpus)) as engine:
            for number, cell in enumerate(cells, start=1):
                found = run_cell(*cell, *common, engine)
                show(found, number, len(cells))
                results += found
        return results
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with ProcessPoolExecutor(args.processes, mp_context=context) as pool:
        work = [pool.submit(run_cell, *cell, *common) for cell in cells]
        for number, future in enumerate(as_completed(work), start=1):
            show(future.result(), number, len(cells))
            results += future.result()
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
