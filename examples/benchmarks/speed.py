"""How fast E²VPT is, and how much memory it takes, against what one would use instead.

    python -m examples.benchmarks.speed                                  # ViT-B/16 on the CPU, float32
    python -m examples.benchmarks.speed --device cuda --batch-size 1 32 --dtype bfloat16 --out speed.jsonl

Everything is measured in one process and **side by side**: a round runs every rival once, in random order, and gives
one ratio of times for each pair. What is reported is the median and the quartiles of these ratios, never seconds, so
that other work on the machine, which comes and goes, hits both sides alike. The rivals share the very same frozen
weights in memory.

- *inference*: E²VPT, and token insertion, against the bare backbone (evaluation mode, `torch.inference_mode`);
- *training step* (forward, backward, AdamW on prompts and classifier): E²VPT against token insertion and PEFT's LoRA;
- *memory*: the peak during such a step, weights and optimiser state included, likewise;
- *mixed batch*: throughput with a different adapter for each sample against one adapter for all.

Token insertion is E²VPT as published, visual prompts as tokens in the sequence (`token_insertion.py`). Before anything
is timed, the script makes sure that both give the same logits for the same prompts.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import random
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import peft
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import ViTConfig, ViTForImageClassification

from e2vpt_peft import E2VPTConfig

from .token_insertion import insert_prompts

HEAD = ["classifier"]
NUM_LABELS = 100
PARTS = ("inference", "training", "memory", "mixed")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# At most so many times the rival's time, at ViT-B/16 size on a CPU without dropout, by (visual, key-value prompts).
WANTED_INFERENCE = {(10, 5): 1.02, (50, 5): 1.04, (100, 5): 1.08}
WANTED_TRAINING = {(10, 5): 0.90, (50, 5): 0.75, (100, 5): 0.62}
WANTED_AGAINST_LORA = {(10, 5): 1.0}
WANTED_MIXED = 0.9  # at least

Call = Callable[[], Any]


@dataclass(frozen=True)
class Prompts:
    """Numbers of prompts in each layer, and the dropout on the visual ones."""

    visual: int
    kv: int
    dropout: float = 0.0

    @property
    def counts(self) -> tuple[int, int]:
        return self.visual, self.kv


@dataclass
class Row:
    """One line of the table: `subject` divided by `rival`, median and quartiles over the rounds."""

    measure: str
    subject: str
    rival: str
    prompts: str
    dropout: float | None
    batch_size: int
    ratio: float
    low: float
    high: float
    rounds: int
    wanted: str | None = None


# --- the rivals -----------------------------------------------------------------------------------


def build_backbone(options: argparse.Namespace) -> ViTForImageClassification:
    """A ViT with random weights, by default of the size of ViT-B/16. Speed does not depend on the weights."""
    torch.manual_seed(options.seed)
    config = ViTConfig(
        image_size=options.image_size,
        patch_size=options.patch_size,
        hidden_size=options.hidden_size,
        intermediate_size=4 * options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_labels=NUM_LABELS,
        attn_implementation="sdpa",
    )
    model = ViTForImageClassification(config).to(options.device, DTYPES[options.dtype])
    return model.requires_grad_(False).eval()


def copy_of(backbone: ViTForImageClassification) -> ViTForImageClassification:
    """A copy with modules of its own and the same weights: not only equal ones, but the same memory.

    So no rival has its weights in a better place, and many rivals fit into memory. The classifier is copied.
    """
    shared = [*backbone.vit.parameters(), *backbone.vit.buffers()]
    return copy.deepcopy(backbone, memo={id(tensor): tensor for tensor in shared})


def build_e2vpt(
    backbone: ViTForImageClassification, prompts: Prompts, adapters: Sequence[str] = ("one",)
) -> PeftModel:
    """E²VPT by this package, with the classifier trainable."""
    config = E2VPTConfig(
        num_visual_prompts=prompts.visual,
        num_kv_prompts=prompts.kv,
        prompt_dropout=prompts.dropout,
        modules_to_save=HEAD,
    )
    return _add_adapters(copy_of(backbone), config, adapters)


def build_lora(backbone: ViTForImageClassification, adapters: Sequence[str] = ("one",)) -> PeftModel:
    """PEFT's LoRA in its most common setting, with the classifier trainable."""
    # Not the usual start, in which adapters change nothing, to tell one from the other.
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], modules_to_save=HEAD, init_lora_weights=False)
    return _add_adapters(copy_of(backbone), config, adapters)


def build_token_insertion(backbone: ViTForImageClassification, prompts: Prompts) -> ViTForImageClassification:
    """E²VPT as published, with the classifier trainable."""
    model = copy_of(backbone)
    insert_prompts(model, prompts.visual, prompts.kv, prompts.dropout)
    return model


def _add_adapters(model: ViTForImageClassification, config: peft.PeftConfig, adapters: Sequence[str]) -> PeftModel:
    # All in the type of the backbone: with PEFT's default, a float32 adapter for bfloat16 weights, LoRA is slowed down
    # by conversions that prompts do not need.
    first, *others = adapters
    adapted = get_peft_model(model, config, adapter_name=first, autocast_adapter_dtype=False)
    for name in others:
        adapted.add_adapter(name, copy.deepcopy(config), autocast_adapter_dtype=False)
    return adapted


@torch.no_grad()
def copy_prompts(e2vpt: PeftModel, inserted: ViTForImageClassification, adapter: str = "one") -> None:
    """Give the token-insertion model the prompts and the classifier of the E²VPT model."""
    vit = e2vpt.get_base_model().vit
    for source, target in zip(vit.layers, inserted.vit.layers):
        target.visual_prompts.copy_(source.attention.e2vpt_visual_prompts[adapter])
        target.attention.kv_prompts.copy_(source.attention.e2vpt_kv_prompts[adapter])
    head = e2vpt.get_base_model().classifier.modules_to_save[adapter]
    inserted.classifier.load_state_dict(head.state_dict())


@torch.inference_mode()
def check_same_function(e2vpt: PeftModel, inserted: ViTForImageClassification, images: torch.Tensor) -> float:
    """Make sure that two models compute the same logits; returns the largest difference.

    Raises:
        AssertionError: They do not, so that comparing their speed would mean nothing.
    """
    models: list[nn.Module] = [e2vpt.eval(), inserted.eval()]
    ours, theirs = (model(pixel_values=images).logits.float() for model in models)
    scale = max(1.0, theirs.abs().max().item())
    difference = (ours - theirs).abs().max().item() / scale
    tolerance = 1e-4 if images.dtype == torch.float32 else 5e-2
    if not difference <= tolerance:
        raise AssertionError(f"E²VPT and token insertion differ by {difference:.1e} with the same prompts.")
    return difference


@torch.inference_mode()
def check_mixed_batch(model: PeftModel, images: torch.Tensor, names: Sequence[str]) -> float:
    """Make sure that the samples of one adapter get the same logits in a mixed batch as alone."""
    model.eval().set_adapter(names[0])
    rows = [row for row, name in enumerate(names) if name == names[0]]
    mixed = model(pixel_values=images, adapter_names=list(names)).logits[rows].float()
    alone = model(pixel_values=images).logits[rows].float()
    difference = (mixed - alone).abs().max().item() / max(1.0, alone.abs().max().item())
    tolerance = 1e-4 if images.dtype == torch.float32 else 5e-2
    if not difference <= tolerance:
        raise AssertionError(f"A mixed batch differs by {difference:.1e} from one adapter alone.")
    return difference


# --- what is measured -----------------------------------------------------------------------------


def inference(model: nn.Module, images: torch.Tensor, **kwargs: Any) -> Call:
    """A forward pass as in evaluation."""
    model.eval()

    @torch.inference_mode()
    def call() -> None:
        model(pixel_values=images, **kwargs)

    return call


def training_step(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Call:
    """A training step: forward, loss, backward and AdamW on all that is trainable."""
    model.train()
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-4)

    def call() -> None:
        loss = F.cross_entropy(model(pixel_values=images).logits.float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    call.state = optimizer.state  # type: ignore[attr-defined]
    return call


def time_side_by_side(
    calls: dict[str, Call], rounds: int, device: torch.device, least_seconds: float = 0.02, seed: int = 0
) -> dict[str, list[float]]:
    """Seconds of each call in each round. Every round has all calls, in random order.

    Args:
        calls (`dict[str, Callable]`): What to time.
        rounds (`int`): How many rounds.
        device (`torch.device`): Where the calls run.
        least_seconds (`float`): Short calls are repeated within a round until they take about this long.
        seed (`int`): Seed of the order.
    """
    order = random.Random(seed)
    for call in calls.values():
        call()  # warm-up: allocators, kernels, optimiser state
    longest = max(_seconds(call, 1, device) for call in calls.values())
    repeats = max(1, round(least_seconds / longest))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name in order.sample(list(calls), len(calls)):
            times[name].append(_seconds(calls[name], repeats, device))
    return times


def _seconds(call: Call, repeats: int, device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(step: Call, model: nn.Module, device: torch.device) -> int:
    """The most bytes that `model` and one training step of it hold at any moment.

    That is its weights and optimiser state, which exist before, plus the highest rise above what is allocated when the
    step begins: from the allocator's own count on a GPU, from every single allocation and release that torch's
    profiler records on a CPU. So it is exact and repeatable, temporaries within an operation included, and other
    models in the process do not count. (What a library takes past torch's allocator is not seen.)
    """
    step()
    tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    state = [value for values in step.state.values() for value in values.values()]  # type: ignore[attr-defined]
    resting = sum(tensor.nbytes for tensor in [*tensors.values(), *state])
    return resting + (_peak_rise_cuda(step, device) if device.type == "cuda" else _peak_rise_cpu(step))


def _peak_rise_cuda(step: Call, device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_rise_cpu(step: Call) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    held = peak = 0
    for _, size in changes:
        held += size
        peak = max(peak, held)
    return peak


# --- from measurements to rows --------------------------------------------------------------------


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles of the ratio of two series, round by round."""
    values = [a / b for a, b in zip(numerator, denominator)]
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"ratio": median(values), "low": low, "high": high, "rounds": len(values)}


def measure_prompts(
    options: argparse.Namespace, backbone: ViTForImageClassification, counts: tuple[int, int], batch_size: int
) -> Iterator[Row]:
    """Inference, training steps and memory with one setting of prompts."""
    device = torch.device(options.device)
    images, labels = make_batch(options, batch_size)
    for dropout in options.dropout:
        prompts = Prompts(*counts, dropout)
        shown: dict[str, Any] = {"prompts": f"{counts[0]}, {counts[1]}", "batch_size": batch_size}
        e2vpt, inserted = build_e2vpt(backbone, prompts), build_token_insertion(backbone, prompts)
        copy_prompts(e2vpt, inserted)
        check_same_function(e2vpt, inserted, images)

        if "inference" in options.parts and dropout == options.dropout[0]:  # dropout is nothing in inference
            models = {"bare backbone": backbone, "E²VPT": e2vpt, "token insertion": inserted}
            calls = {name: inference(model, images) for name, model in models.items()}
            times = time_side_by_side(calls, options.rounds, device, seed=options.seed)
            for subject in ("E²VPT", "token insertion"):
                found = ratios(times[subject], times["bare backbone"])
                row = Row("inference time", subject, "bare backbone", dropout=None, **shown, **found)
                if subject == "E²VPT" and is_vit_b_on_cpu(options):
                    row.wanted = at_most(WANTED_INFERENCE.get(counts))
                yield row

        models = {"E²VPT": e2vpt, "token insertion": inserted, "LoRA": build_lora(backbone)}
        steps = {name: training_step(model, images, labels) for name, model in models.items()}
        if "training" in options.parts:
            times = time_side_by_side(steps, options.rounds, device, seed=options.seed)
            for rival, wanted in (("token insertion", WANTED_TRAINING), ("LoRA", WANTED_AGAINST_LORA)):
                found = ratios(times["E²VPT"], times[rival])
                row = Row("training step time", "E²VPT", rival, dropout=dropout, **shown, **found)
                if not dropout and is_vit_b_on_cpu(options):
                    row.wanted = at_most(wanted.get(counts))
                yield row
        if "memory" in options.parts:
            peaks = {name: peak_memory(steps[name], models[name], device) for name in models}
            for rival in ("token insertion", "LoRA"):
                found = ratios([peaks["E²VPT"]], [peaks[rival]])
                yield Row("training step peak memory", "E²VPT", rival, dropout=dropout, **shown, **found)


def measure_mixed_batch(options: argparse.Namespace, backbone: ViTForImageClassification) -> Iterator[Row]:
    """Throughput of a batch with many adapters in it, against one adapter for the whole batch."""
    names = [f"task{number}" for number in range(options.adapters)]
    batch_size = options.mixed_batch_size
    images, _ = make_batch(options, batch_size)
    samples = [names[row % len(names)] for row in range(batch_size)]
    counts = options.prompts[0]
    models = {"E²VPT": build_e2vpt(backbone, Prompts(*counts), names), "LoRA": build_lora(backbone, names)}
    calls = {}
    for method, model in models.items():
        check_mixed_batch(model, images, samples)
        calls[f"{method}, one adapter"] = inference(model, images)
        calls[f"{method}, mixed"] = inference(model, images, adapter_names=samples)
    times = time_side_by_side(calls, options.mixed_rounds, torch.device(options.device), seed=options.seed)
    for method, prompts in (("E²VPT", f"{counts[0]}, {counts[1]}"), ("LoRA", "")):
        one, mixed = f"{method}, one adapter", f"{method}, mixed"
        found = ratios(times[one], times[mixed])  # throughput is one over time
        row = Row(
            "throughput", f"{method}, {len(names)} adapters in the batch", one, prompts, None, batch_size, **found
        )
        if method == "E²VPT":
            row.wanted = f"≥ {WANTED_MIXED:.2f}"
        yield row


def make_batch(options: argparse.Namespace, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(options.seed)
    images = torch.randn(batch_size, 3, options.image_size, options.image_size, generator=generator)
    labels = torch.randint(NUM_LABELS, (batch_size,), generator=generator)
    return images.to(options.device, DTYPES[options.dtype]), labels.to(options.device)


def is_vit_b_on_cpu(options: argparse.Namespace) -> bool:
    """Whether the wanted ratios, which are for ViT-B/16 on a CPU, apply."""
    sizes = (options.hidden_size, options.layers, options.heads, options.patch_size, options.image_size)
    return torch.device(options.device).type == "cpu" and sizes == (768, 12, 12, 16, 224)


def at_most(limit: float | None) -> str | None:
    return None if limit is None else f"≤ {limit:.2f}"


# --- output ---------------------------------------------------------------------------------------


def describe_run(options: argparse.Namespace, benchmark: str, command: Sequence[str]) -> dict[str, Any]:
    """All that one must know to judge and to repeat the measurement."""
    device = torch.device(options.device)
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{_cpu_name()}, {torch.get_num_threads()} threads"
    return {
        "hardware": hardware,
        "weights": options.dtype,
        "model": f"ViT, hidden size {options.hidden_size}, {options.layers} layers, patches of {options.patch_size}, "
        f"images of {options.image_size}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "command": shlex.join(["python", "-m", f"examples.benchmarks.{benchmark}", *command]),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def header(run: dict[str, Any]) -> str:
    """The lines above the table."""
    versions = ", ".join(f"{name} {run[name]}" for name in ("torch", "transformers", "peft"))
    return f"{run['model']}. Weights in {run['weights']}. {run['hardware']}. {versions}.\n\n    {run['command']}\n"


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table: median of the ratios and, in brackets, their quartiles."""
    titles = ["ratio of", "", "against", "prompts", "dropout", "batch", "median (quartiles)", "wanted"]
    lines = [titles, ["---"] * len(titles)]
    for row in rows:
        spread = f" ({row.low:.3f}–{row.high:.3f})" if row.rounds > 1 else ""
        dropout = "" if row.dropout is None else f"{row.dropout:g}"
        lines.append(
            [row.measure, row.subject, row.rival, row.prompts, dropout, str(row.batch_size)]
            + [f"{row.ratio:.3f}{spread}", row.wanted or ""]
        )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def append_json_lines(path: Path, run: dict[str, Any], rows: Sequence[Row]) -> None:
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({**asdict(row), **run}, ensure_ascii=False) + "\n")


# --- command line ---------------------------------------------------------------------------------


def parse(command: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights and images (default: float32)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[4], help="one or more (default: 4)")
    parser.add_argument("--rounds", type=int, default=10, help="rounds of each comparison (default: 10)")
    parser.add_argument(
        "--prompts", type=_pair, nargs="+", default=[(10, 5), (50, 5), (100, 5)],
        help="visual and key-value prompts (default: 10,5 50,5 100,5)",
    )  # fmt: skip
    parser.add_argument(
        "--dropout", type=float, nargs="+", default=[0.0, 0.1], help="on visual prompts (default: 0 0.1)"
    )
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=PARTS, help="what to measure (default: all)")
    parser.add_argument("--adapters", type=int, default=16, help="adapters in the mixed batch (default: 16)")
    parser.add_argument("--mixed-batch-size", type=int, default=32, help="size of the mixed batch (default: 32)")
    parser.add_argument("--mixed-rounds", type=int, default=5, help="rounds with the mixed batch (default: 5)")
    parser.add_argument("--out", type=Path, help="append the results to this file, as JSON lines")
    parser.add_argument("--seed", type=int, default=0, help="of weights, images and order (default: 0)")
    sizes = parser.add_argument_group("size of the model (default: ViT-B/16)")
    sizes.add_argument("--image-size", type=int, default=224)
    sizes.add_argument("--patch-size", type=int, default=16)
    sizes.add_argument("--hidden-size", type=int, default=768)
    sizes.add_argument("--layers", type=int, default=12)
    sizes.add_argument("--heads", type=int, default=12)
    return parser.parse_args(command)


def _pair(text: str) -> tuple[int, int]:
    visual, kv = (int(number) for number in text.split(","))
    if visual < 1 or kv < 1:
        raise argparse.ArgumentTypeError(f"'{text}': the comparison needs at least one prompt of each kind.")
    return visual, kv


def main(command: Sequence[str] | None = None) -> list[Row]:
    """Measure, print the table, and return its rows."""
    command = sys.argv[1:] if command is None else command
    options = parse(command)
    if options.threads:
        torch.set_num_threads(options.threads)
    run = describe_run(options, "speed", command)
    print(header(run), flush=True)
    backbone = build_backbone(options)
    rows: list[Row] = []
    if set(options.parts) != {"mixed"}:
        for batch_size in options.batch_size:
            for counts in options.prompts:
                rows += measure_prompts(options, backbone, counts, batch_size)
    if "mixed" in options.parts:
        rows += measure_mixed_batch(options, backbone)
    print(markdown(rows))
    if options.out:
        append_json_lines(options.out, run, rows)
    return rows


if __name__ == "__main__":
    main()
