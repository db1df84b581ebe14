"""How fast E²VPT is, and how much memory it takes, against what one would use instead.

    python -m examples.benchmarks.speed --threads 2 --out speed.jsonl      # all but "compiled", on the CPU: an hour
    python -m examples.benchmarks.speed --show speed.jsonl                 # the tables of a file
    python -m examples.benchmarks.speed --parts operations                 # counted, in seconds

Everything is measured in one process and **side by side**: a round runs every side once, in random order, and gives
one ratio of times for each pair. What is reported is the median and the quartiles of these ratios, never seconds, so
that other work on the machine, which comes and goes, hits both sides alike. All share the very same frozen weights in
memory.

- *inference*, as users run it (evaluation mode, `torch.inference_mode`): E²VPT, token insertion and PEFT's LoRA
  against the backbone;
- *compiled*: the same with `torch.compile`, and with visual prompts converted; it needs a C++ compiler;
- *training*: a step (forward, backward, AdamW on what is trainable) of E²VPT against a linear probe, token insertion
  and LoRA;
- *memory*: the peak during such a step, weights and optimiser state included, likewise;
- *mixed*: throughput with another adapter for each sample against one adapter for all;
- *operations*: how many do work in an inference.

Token insertion is E²VPT as published, visual prompts as tokens in the sequence (`token_insertion.py`). Before anything
is timed, the script makes sure that both give the same logits for the same prompts. For a GPU, see `gpu.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from .measuring.comparisons import (
    COMPILED,
    MEMORY,
    STEP,
    compare_compiled,
    compare_inference,
    compare_mixed_batch,
    compare_operations,
    compare_training,
)
from .measuring.methods import build_backbone
from .measuring.rows import Row, append, describe_run, latest, read
from .measuring.setup import SIZES, Prompts, Setup, add_options, prompts_of, setup_of
from .measuring.tables import header, tables
from .measuring.timing import CLOCKS, time_side_by_side

PARTS = ("operations", "inference", COMPILED, "training", "memory", "mixed")


def measure(options: argparse.Namespace, setup: Setup) -> Iterator[Row]:
    """All that is asked for, at one size of the backbone."""
    backbone = build_backbone(setup)
    timer = functools.partial(
        time_side_by_side,
        device=setup.device,
        rounds=options.rounds,
        seconds=options.seconds,
        seed=options.seed,
        clock=options.clock,
    )
    prompts: list[Prompts] = options.prompts
    if "operations" in options.parts:
        yield from compare_operations(setup, backbone, prompts)
    if "inference" in options.parts:
        for batch_size in options.batch_size:
            for counts in prompts:
                yield from compare_inference(setup, backbone, counts, batch_size, timer)
    if COMPILED in options.parts:
        for batch_size in options.batch_size:
            for counts in prompts:
                yield from compare_compiled(setup, backbone, counts, batch_size, timer)
    measures = [name for part, name in (("training", STEP), ("memory", MEMORY)) if part in options.parts]
    if measures:
        for batch_size in options.training_batch_size:
            for counts in prompts:
                for dropout in options.dropout:
                    dropped = dataclasses.replace(counts, dropout=dropout)
                    yield from compare_training(setup, backbone, dropped, batch_size, timer, measures)
    if "mixed" in options.parts:
        yield from compare_mixed_batch(setup, backbone, prompts[0], options.adapters, options.mixed_batch_size, timer)


def parse(command: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument(
        "--model", choices=SIZES, nargs="+", default=["ViT-S/16", "ViT-B/16"],
        help="sizes of the backbone (default: ViT-S/16 ViT-B/16)",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 8, 32], help="(default: 1 8 32)")
    parser.add_argument("--training-batch-size", type=int, nargs="+", default=[8], help="(default: 8)")
    parser.add_argument(
        "--prompts", type=prompts_of, nargs="+", default=[Prompts(10, 5), Prompts(50, 5), Prompts(100, 5)],
        help="visual and key-value prompts (default: 10,5 50,5 100,5)",
    )  # fmt: skip
    parser.add_argument(
        "--dropout", type=float, nargs="+", default=[0.0, 0.1], help="on visual prompts, in training (default: 0 0.1)"
    )
    parser.add_argument(
        "--parts",
        choices=PARTS,
        nargs="+",
        default=[part for part in PARTS if part != COMPILED],
        help="what to measure (default: all but compiled)",
    )
    parser.add_argument("--adapters", type=int, default=16, help="adapters in the mixed batch (default: 16)")
    parser.add_argument("--mixed-batch-size", type=int, default=32, help="size of the mixed batch (default: 32)")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: only while this process runs; for 1 thread on a busy machine",
    )
    parser.add_argument("--out", type=Path, help="append each result to this file, as JSON lines")
    parser.add_argument("--show", type=Path, help="measure nothing; print the tables of this file")
    return parser.parse_args(command)


def main(command: Sequence[str] | None = None) -> list[Row]:
    """Measure, print the tables, and return their rows."""
    command = sys.argv[1:] if command is None else command
    options = parse(command)
    if options.show:
        rows, run = read(options.show)
    else:
        rows = []
        for name in options.model:
            setup = setup_of(options, SIZES[name])
            run = describe_run(setup.device, options.dtype, "speed", command)
            for row in measure(options, setup):
                rows.append(row)
                if options.out:
                    append(options.out, run, [row])
    print(header(run))
    print(tables(latest(rows)))
    return rows


if __name__ == "__main__":
    main()
