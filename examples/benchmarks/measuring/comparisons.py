"""What is compared with what, as rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import nn
from transformers import ViTForImageClassification

from e2vpt_peft import convert_to_kv_prompts, keep_prefixes

from .agreement import check_mixed_batch, check_same_function
from .calls import Call, TrainingStep, compiled, inference
from .memory import peak_memory
from .methods import build_e2vpt, build_linear_probe, build_lora, build_token_insertion, copy_prompts
from .operations import count_operations
from .rows import Row
from .setup import ALL_BESIDE, Prompts, Setup
from .timing import ratios, spread

BACKBONE, LORA, PROBE, INSERTED = "backbone", "LoRA", "linear probe", "inserted tokens"
NOTHING_KEPT = "no prefix kept"
COMPILED = "compiled"
INFERENCE, STEP, MEMORY, THROUGHPUT, OPERATIONS = (
    "inference time",
    "training step time",
    "peak memory of a training step",
    "throughput of a mixed batch",
    "operations of an inference",
)
Timer = Callable[[dict[str, Call]], dict[str, list[float]]]


def ours(prompts: Prompts) -> str:
    """What tables call E²VPT with some prompts."""
    return f"E²VPT {prompts}"


def against(
    setup: Setup, measure: str, times: Mapping[str, list[float]], baseline: str, batch_size: int, mode: str = "eager"
) -> Iterator[Row]:
    """A row for the ratio of each to a baseline."""
    for name, values in times.items():
        if name != baseline:
            found = ratios(values, times[baseline])
            yield Row.of(measure, setup.size.name, batch_size, name, baseline, found, mode)


def pair(backbone: ViTForImageClassification, prompts: Prompts, images: torch.Tensor) -> dict[str, nn.Module]:
    """E²VPT by this package and as published, with the same prompts, checked to be the same function."""
    e2vpt, inserted = build_e2vpt(backbone, prompts), build_token_insertion(backbone, prompts)
    copy_prompts(e2vpt, inserted)
    check_same_function(e2vpt, inserted, images)
    return {ours(prompts): e2vpt, f"{INSERTED} {prompts}": inserted}


def converted(backbone: ViTForImageClassification, prompts: Prompts) -> dict[str, nn.Module]:
    """E²VPT with its visual prompts converted, by the name that tables have for it."""
    model = build_e2vpt(backbone, prompts)
    convert_to_kv_prompts(model)
    return {f"{ours(prompts)}, converted": model}


def compare_inference(
    setup: Setup, backbone: ViTForImageClassification, prompts: Prompts, batch_size: int, timer: Timer
) -> Iterator[Row]:
    """Inference with an adapter, against the backbone."""
    images, _ = setup.batch(batch_size)
    models = {
        BACKBONE: backbone,
        **pair(backbone, prompts, images),
        ours(ALL_BESIDE): build_e2vpt(backbone, ALL_BESIDE),
        LORA: build_lora(backbone),
    }
    times = timer({name: inference(model, images) for name, model in models.items()})
    yield from against(setup, INFERENCE, times, BACKBONE, batch_size)


def compare_compiled(
    setup: Setup, backbone: ViTForImageClassification, prompts: Prompts, batch_size: int, timer: Timer
) -> Iterator[Row]:
    """Inference of compiled models, against the compiled backbone."""
    torch._dynamo.reset()  # what is compiled of one class of models is limited; beyond that it runs eagerly
    images, _ = setup.batch(batch_size)
    models = {
        BACKBONE: backbone,
        ours(prompts): build_e2vpt(backbone, prompts),
        **converted(backbone, prompts),
        ours(ALL_BESIDE): build_e2vpt(backbone, ALL_BESIDE),
        LORA: build_lora(backbone),
    }
    toy = setup.size.name == "toy"
    times = timer({name: inference(model, images, compiled(model, toy)) for name, model in models.items()})
    yield from against(setup, INFERENCE, times, BACKBONE, batch_size, COMPILED)


def compare_training(
    setup: Setup,
    backbone: ViTForImageClassification,
    prompts: Prompts,
    batch_size: int,
    timer: Timer,
    measures: Sequence[str] = (STEP, MEMORY),
) -> Iterator[Row]:
    """Training steps and their memory: E²VPT against a linear probe, token insertion and LoRA, and with
    prompts beside the attention against LoRA."""
    images, labels = setup.batch(batch_size)
    e2vpt, inserted = pair(backbone, prompts, images).values()
    models = {
        ours(prompts): e2vpt,
        ours(ALL_BESIDE): build_e2vpt(backbone, ALL_BESIDE),
        PROBE: build_linear_probe(backbone),
        INSERTED: inserted,
        LORA: build_lora(backbone),
    }
    compared = [*((ours(prompts), baseline) for baseline in (PROBE, INSERTED, LORA)), (ours(ALL_BESIDE), LORA)]
    steps = {name: TrainingStep(model, images, labels) for name, model in models.items()}
    found = {}
    if STEP in measures:
        found[STEP] = timer(dict(steps))
    if MEMORY in measures:
        found[MEMORY] = {name: [peak_memory(step, models[name], setup.device)] for name, step in steps.items()}
    for measure, values in found.items():
        for subject, baseline in compared:
            ratio = ratios(values[subject], values[baseline])
            yield Row.of(measure, setup.size.name, batch_size, subject, baseline, ratio)


def compare_mixed_batch(
    setup: Setup, backbone: ViTForImageClassification, prompts: Prompts, adapters: int, batch_size: int, timer: Timer
) -> Iterator[Row]:
    """Throughput with another adapter for each sample, against one adapter for all."""
    names = [f"task{number}" for number in range(adapters)]
    images, _ = setup.batch(batch_size)
    samples = [names[row % len(names)] for row in range(batch_size)]
    models = {ours(counts): build_e2vpt(backbone, counts, names) for counts in (prompts, ALL_BESIDE)}
    models[LORA] = build_lora(backbone, names)
    calls = {}
    for method, model in models.items():
        check_mixed_batch(model, images, samples)
        calls[f"{method} alone"] = inference(model, images)
        calls[f"{method} mixed"] = inference(model, images, adapter_names=samples)
    times = timer(calls)
    for method in models:
        found = ratios(times[f"{method} alone"], times[f"{method} mixed"])  # throughput is one over time
        subject = f"{method}, {adapters} adapter{'s' * (adapters > 1)}"
        yield Row.of(THROUGHPUT, setup.size.name, batch_size, subject, "one adapter", found)


def compare_operations(setup: Setup, backbone: ViTForImageClassification, prompts: Sequence[Prompts]) -> Iterator[Row]:
    """Operations that do work, in an inference of two images, with one adapter or with one for each."""
    images, _ = setup.batch(2)
    calls = {BACKBONE: inference(backbone, images), LORA: inference(build_lora(backbone), images)}
    for counts in (*prompts, ALL_BESIDE):
        model = build_e2vpt(backbone, counts, ["one", "two"])
        computed = {ours(counts): build_e2vpt(backbone, counts)}
        computed |= converted(backbone, counts) if counts.visual else {}
        calls[ours(counts)] = inference(model, images)
        for name, anew in computed.items():
            keep_prefixes(anew, False)
            calls[f"{name}, {NOTHING_KEPT}"] = inference(anew, images)
        calls[f"{ours(counts)}, two adapters"] = inference(model, images, adapter_names=["one", "two"])
    counted = {name: count_operations(call).total() for name, call in calls.items()}
    for name, count in counted.items():
        for baseline, value in (("", count), (BACKBONE, count / counted[BACKBONE])):
            yield Row.of(OPERATIONS, setup.size.name, len(images), name, baseline, spread([value]))
