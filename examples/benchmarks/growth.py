"""How the cost of E²VPT grows with prompts, image size, depth and adapters. Measures as `speed.py` does.

    python -m examples.benchmarks.growth --plot growth.png
    python -m examples.benchmarks.growth --device cuda --dtype bfloat16 --batch-size 32 --plot growth.png

One thing grows at a time, from ViT-B/16 with 10 visual and 5 key-value prompts. For each size: inference time against
the backbone, peak memory of a training step against LoRA, the size of the adapter's file, the time to switch to
another adapter as a share of one inference, and the throughput of a batch that mixes adapters.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel

from .measuring.calls import TrainingStep, inference
from .measuring.memory import peak_memory
from .measuring.methods import build_backbone, build_e2vpt, build_lora
from .measuring.rows import describe_run
from .measuring.setup import SIZES, Prompts, Setup, add_options, prompts_of, setup_of
from .measuring.tables import header
from .measuring.timing import ratios, time_side_by_side

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GROWTH: dict[str, Sequence[int]] = {
    "visual prompts": (1, 5, 10, 20, 50, 100),
    "key-value prompts": (1, 5, 10, 20, 50, 100),
    "image size": (96, 160, 224, 320, 384),
    "layers": (3, 6, 12, 24),
    "adapters": (2, 4, 8, 16),
}
"""What grows, and its sizes. `--sizes` replaces them."""

INFERENCE, MEMORY, FILE, SWITCH, MIXED = (
    "inference time, times the bare backbone",
    "peak memory of a training step, times LoRA",
    "adapter file in kB, without head",
    "time to switch adapters, times one inference",
    "throughput of a mixed batch, times one adapter",
)
PLOTTED = (INFERENCE, MEMORY, MIXED)
"""Ratios, for a picture. The size of the file is proportional to the prompts, and switching takes next to no time."""


def point(setup: Setup, prompts: Prompts, dimension: str, size: int) -> tuple[Setup, Prompts, int]:
    """The setup, prompts and number of adapters where one dimension has a size and the others their own."""
    if dimension in ("image size", "layers"):
        field = dimension.replace(" ", "_")
        setup = dataclasses.replace(setup, size=dataclasses.replace(setup.size, **{field: size}))
    visual = size if dimension == "visual prompts" else prompts.visual
    kv = size if dimension == "key-value prompts" else prompts.kv
    return setup, Prompts(visual, kv), size if dimension == "adapters" else 2


def adapter_file_size(model: PeftModel) -> int:
    """Bytes of the file of the first adapter, less those of the head, which is the same for every method."""
    head = sum(p.nbytes for name, p in model.named_parameters() if "classifier.modules_to_save.one." in name)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, selected_adapters=["one"])
        return next(Path(folder).rglob("adapter_model.safetensors")).stat().st_size - head


def switching(model: PeftModel, names: Sequence[str]) -> Callable[[], None]:
    """A call that makes the next adapter active."""
    turn = 0

    def call() -> None:
        nonlocal turn
        turn = (turn + 1) % len(names)
        model.set_adapter(names[turn])

    return call


def measure(options: argparse.Namespace, dimension: str, size: int) -> Iterator[dict[str, Any]]:
    """Every measure at one size, as a median with quartiles."""
    setup = setup_of(options, SIZES[options.model])
    setup, prompts, adapters = point(setup, options.prompts, dimension, size)
    backbone = build_backbone(setup)
    images, labels = setup.batch(options.batch_size)
    names = ["one", *(f"other{number}" for number in range(1, adapters))]
    model = build_e2vpt(backbone, prompts, names)
    here = {"dimension": dimension, "size": size, "batch_size": len(images)}

    def row(name: str, numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, Any]:
        found = ratios(numerator, denominator)
        return {
            **here,
            "measure": name,
            "ratio": found.value,
            "low": found.low,
            "high": found.high,
            "rounds": found.rounds,
        }

    timer = functools.partial(
        time_side_by_side, device=setup.device, rounds=options.rounds, seconds=options.seconds, seed=options.seed
    )
    mixed = {"adapter_names": [names[row % adapters] for row in range(len(images))]}
    times = timer(
        {
            "backbone": inference(backbone, images),
            "E²VPT": inference(model, images),
            "mixed": inference(model, images, **mixed),
        }
    )
    yield row(INFERENCE, times["E²VPT"], times["backbone"])
    yield row(MIXED, times["E²VPT"], times["mixed"])

    times = timer({"E²VPT": inference(model, images), "switch": switching(model, names)})
    yield row(SWITCH, times["switch"], times["E²VPT"])

    model.set_adapter("one")
    peaks = [
        peak_memory(TrainingStep(adapted, images, labels), adapted, setup.device)
        for adapted in (model, build_lora(backbone, names))
    ]
    yield row(MEMORY, peaks[:1], peaks[1:])
    yield row(FILE, [adapter_file_size(model)], [1000])


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A row for each size of what grows, a column for each measure."""
    measures = list(dict.fromkeys(row["measure"] for row in rows))
    lines = [["what grows", "size", *measures], ["---"] * (len(measures) + 2)]
    for dimension, size in dict.fromkeys((row["dimension"], row["size"]) for row in rows):
        here = {r["measure"]: r["ratio"] for r in rows if (r["dimension"], r["size"]) == (dimension, size)}
        lines.append([dimension, str(size), *(shown(here[name]) for name in measures)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def shown(ratio: float) -> str:
    return f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.3g}"


def plot(rows: Sequence[dict[str, Any]]) -> Figure:
    """A panel for what grows (down) and for each ratio that it may change (across), with quartiles."""
    from matplotlib.figure import Figure

    dimensions = list(dict.fromkeys(row["dimension"] for row in rows))
    figure = Figure(figsize=(6.9, 0.4 + 1.5 * len(dimensions)), layout="constrained")
    panels = figure.subplots(len(dimensions), len(PLOTTED), squeeze=False, sharey="col", sharex="row")
    for line, dimension in zip(panels, dimensions):
        for axes, measure_ in zip(line, PLOTTED):
            own = [row for row in rows if row["measure"] == measure_ and row["dimension"] == dimension]
            sizes = [row["size"] for row in own]
            axes.plot(sizes, [row["ratio"] for row in own], marker="o", markersize=4)
            axes.fill_between(sizes, [row["low"] for row in own], [row["high"] for row in own], alpha=0.2)
            axes.axhline(1, color="0.6", linewidth=0.8, zorder=0)
            axes.set_xscale("log" if max(sizes) > 10 * min(sizes) else "linear")
            axes.set_xticks(sizes, map(str, sizes), minor=False)
            axes.xaxis.minorticks_off()
            axes.tick_params(labelsize=8)
            axes.grid(alpha=0.3)
            axes.set_xlabel(dimension, fontsize=9)
    for axes, measure_ in zip(panels[0], PLOTTED):
        axes.set_title(measure_.replace(", ", ",\n"), fontsize=9)
    return figure


def parse(command: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--model", choices=SIZES, default="ViT-B/16", help="size of the backbone (default: ViT-B/16)")
    parser.add_argument("--batch-size", type=int, default=4, help="(default: 4)")
    parser.add_argument(
        "--prompts", type=prompts_of, default=Prompts(10, 5), help="visual and key-value prompts (default: 10,5)"
    )
    parser.add_argument("--grow", choices=GROWTH, nargs="+", default=list(GROWTH), help="what grows (default: all)")
    parser.add_argument("--sizes", type=int, nargs="+", help="its sizes, in place of those in the table GROWTH")
    parser.add_argument("--out", type=Path, help="append the results to this file, as JSON lines")
    parser.add_argument("--plot", type=Path, help="save the plot there")
    return parser.parse_args(command)


def main(command: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print the table, and return its rows."""
    command = sys.argv[1:] if command is None else command
    options = parse(command)
    setup = setup_of(options, SIZES[options.model])
    run = {"model": options.model, **describe_run(setup.device, options.dtype, "growth", command)}
    print(header(run), flush=True)
    rows = []
    for dimension in options.grow:
        for size in options.sizes or GROWTH[dimension]:
            found = list(measure(options, dimension, size))
            rows += found
            if options.out:
                with options.out.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps({**row, **run}, ensure_ascii=False) + "\n" for row in found)
    print(table(rows))
    if options.plot:
        plot(rows).savefig(options.plot, dpi=150)
    return rows


if __name__ == "__main__":
    main()
