"""Inference and training, in every mode."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

from torch import nn

from e2vpt_peft import keep_prefixes

from ..measuring.calls import TrainingStep, compiled
from ..measuring.comparisons import (
    BACKBONE,
    INFERENCE,
    LORA,
    NOTHING_KEPT,
    PROBE,
    STEP,
    against,
    converted,
    ours,
    pair,
)
from ..measuring.memory import peak_memory
from ..measuring.methods import build_e2vpt, build_linear_probe, build_lora
from ..measuring.rows import Row
from ..measuring.setup import ALL_BESIDE
from ..measuring.timing import spread
from .cases import Machine
from .modes import COMPILED, EAGER, GRAPH, in_mode

IMAGES, MEMORY = "images per second", "peak memory of a training step in GB"
TRAINED_IMAGES = "images per second in training"


def measure_inference(machine: Machine, mode: str, batch_size: int) -> list[Row]:
    """Against the backbone: E²VPT with few prompts, many, some beside the attention, converted, or none kept, inserted
    tokens, LoRA, and LoRA merged."""
    images, _ = machine.setup.batch(batch_size)
    models: dict[str, nn.Module] = {BACKBONE: machine.backbone, **pair(machine.backbone, machine.prompts, images)}
    models[LORA] = build_lora(machine.backbone)
    if mode != EAGER:
        models |= converted(machine.backbone, machine.prompts)
    if mode in (EAGER, GRAPH):  # to compile one more takes its time
        models |= pair(machine.backbone, machine.many_prompts, images) | beside(machine)
        models["LoRA, merged"] = merged_lora(machine)
        anew = models[f"{ours(machine.prompts)}, {NOTHING_KEPT}"] = build_e2vpt(machine.backbone, machine.prompts)
        keep_prefixes(anew, False)
    calls = {name: in_mode(machine, mode, model, images) for name, model in models.items()}
    times = machine.time(calls)
    return [
        *against(machine.setup, INFERENCE, times, BACKBONE, batch_size, mode),
        *rates(machine, IMAGES, times, batch_size, mode),
    ]


def beside(machine: Machine) -> dict[str, nn.Module]:
    """E²VPT with prompts beside the attention."""
    return {ours(ALL_BESIDE): build_e2vpt(machine.backbone, ALL_BESIDE)}


def merged_lora(machine: Machine) -> nn.Module:
    """LoRA in the weights of a backbone of its own."""
    lora = build_lora(copy.deepcopy(machine.backbone))
    return lora.merge_and_unload()


def measure_training(machine: Machine, mode: str, batch_size: int) -> list[Row]:
    """A step of E²VPT against a linear probe, inserted tokens and LoRA; and, in eager mode, its memory."""
    images, labels = machine.setup.batch(batch_size)
    models: dict[str, nn.Module] = {
        PROBE: build_linear_probe(machine.backbone),
        **pair(machine.backbone, machine.prompts, images),
        LORA: build_lora(machine.backbone),
    }
    if mode == EAGER:
        models |= pair(machine.backbone, machine.many_prompts, images) | beside(machine)
    steps = {
        name: TrainingStep(model, images, labels, compiled(model, machine.toy) if mode == COMPILED else None)
        for name, model in models.items()
    }
    times = machine.time(dict(steps))
    rows = [
        *against(machine.setup, STEP, times, PROBE, batch_size, mode),
        *against(
            machine.setup, STEP, {name: times[name] for name in (ours(machine.prompts), LORA)}, LORA, batch_size, mode
        ),
        *rates(machine, TRAINED_IMAGES, times, batch_size, mode),
    ]
    if mode == EAGER:
        for name, step in steps.items():
            peak = peak_memory(step, models[name], machine.device) / 1e9
            rows.append(Row.of(MEMORY, machine.setup.size.name, batch_size, name, "", spread([peak])))
    return rows


def rates(
    machine: Machine, measure: str, times: Mapping[str, list[float]], batch_size: int, mode: str
) -> Iterator[Row]:
    """A row for the images per second of each."""
    for name, values in times.items():
        found = spread([batch_size / seconds for seconds in values])
        yield Row.of(measure, machine.setup.size.name, batch_size, name, "", found, mode)
