"""How the cost of E²VPT grows with prompts, image size, depth and adapters. Measures as `speed.py` does, beside it.

    python -m examples.benchmarks.growth --plot growth.png
    python -m examples.benchmarks.growth --device cuda --dtype bfloat16 --batch-size 32 --plot growth.png

One thing grows at a time, from ViT-B/16 with 10 visual and 5 key-value prompts. For each size: inference time against
the bare backbone, peak memory of a training step against LoRA, the size of the adapter's file, the time to switch to
another adapter as a share of one inference, and the throughput of a batch that mixes adapters.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel

from . import speed

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


def point(options: argparse.Namespace, dimension: str, size: int) -> tuple[argparse.Namespace, speed.Prompts, int]:
    """The options, prompts and number of adapters where one dimension has a size and the others their own."""
    options = copy.copy(options)
    if dimension == "image size":
        options.image_size = size
    elif dimension == "layers":
        options.layers = size
    visual, kv = options.prompts[0]
    prompts = speed.Prompts(
        size if dimension == "visual prompts" else visual, size if dimension == "key-value prompts" else kv
    )
    return options, prompts, size if dimension == "adapters" else 2


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
    options, prompts, adapters = point(options, dimension, size)
    device = torch.device(options.device)
    backbone = speed.build_backbone(options)
    images, labels = speed.make_batch(options, options.batch_size[0])
    names = ["one", *(f"other{number}" for number in range(1, adapters))]
    model = speed.build_e2vpt(backbone, prompts, names)
    here = {"dimension": dimension, "size": size, "batch_size": len(images)}

    bare, ours = "bare backbone", "E²VPT"
    calls = {bare: speed.inference(backbone, images), ours: speed.inference(model, images)}
    mixed = {"adapter_names": [names[row % adapters] for row in range(len(images))]}
    calls["mixed"] = speed.inference(model, images, **mixed)
    times = speed.time_side_by_side(calls, options.rounds, device, seed=options.seed)
    yield {**here, "measure": INFERENCE, **speed.ratios(times[ours], times[bare])}
    yield {**here, "measure": MIXED, **speed.ratios(times[ours], times["mixed"])}

    calls = {ours: speed.inference(model, images), "switch": switching(model, names)}
    times = speed.time_side_by_side(calls, options.rounds, device, seed=options.seed)
    yield {**here, "measure": SWITCH, **speed.ratios(times["switch"], times[ours])}

    model.set_adapter("one")
    rivals = {ours: model, "LoRA": speed.build_lora(backbone, names)}
    peaks = {
        name: speed.peak_memory(speed.training_step(rival, images, labels), rival, device)
        for name, rival in rivals.items()
    }
    yield {**here, "measure": MEMORY, **speed.ratios([peaks[ours]], [peaks["LoRA"]])}
    yield {**here, "measure": FILE, **speed.ratios([adapter_file_size(model)], [1000])}


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


def parse(command: Sequence[str]) -> tuple[argparse.Namespace, argparse.Namespace]:
    """Own options, and those of `speed.py`."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(
            "All other options are those of speed.py, such as --threads, --rounds and --out; --batch-size and "
            "--prompts take their first value."
        ),
    )
    parser.add_argument("--grow", choices=GROWTH, nargs="+", default=list(GROWTH), help="what grows (default: all)")
    parser.add_argument("--sizes", type=int, nargs="+", help="its sizes, in place of those in the table GROWTH")
    parser.add_argument("--plot", type=Path, help="save the plot there")
    own, others = parser.parse_known_args(command)
    return own, speed.parse(others)


def main(command: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print the table, and return its rows."""
    command = sys.argv[1:] if command is None else command
    own, options = parse(command)
    if options.threads:
        torch.set_num_threads(options.threads)
    run = speed.describe_run(options, "growth", command)
    print(speed.header(run), flush=True)
    rows = []
    for dimension in own.grow:
        for size in own.sizes or GROWTH[dimension]:
            found = list(measure(options, dimension, size))
            rows += found
            if options.out:
                with options.out.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps({**row, **run}, ensure_ascii=False) + "\n" for row in found)
    print(table(rows))
    if own.plot:
        plot(rows).savefig(own.plot, dpi=150)
    return rows


if __name__ == "__main__":
    main()
