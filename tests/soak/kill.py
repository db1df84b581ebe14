"""SIGKILL, SIGTERM and SIGINT at random moments of a search and of saving: the result is that of an undisturbed run.

As a script: `python -m tests.soak.kill --kills 200 --saves 200`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback

from ..support.children import SIGNALS, child, ended
from ..support.models import tiny_vit
from ..trainer import toy
from ..trainer.interrupted import Events, start

STATE, RESULTS, RESULT = "_pruning_state/state.json", "pruning_results.json", "result"
RATES: dict[str, Any] = {"token_rates": [0.25, 0.5], "segment_rates": [0.0, 0.5]}
BEST: dict[str, Any] = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "accuracy",
    "num_train_epochs": 4,
}
SEARCHES: dict[str, dict[str, Any]] = {
    "grid": {"save_strategy": "steps", "save_steps": 3, "pruning": {**RATES, "importance": "leave_one_out"}},
    "early stopping": {**BEST, "patience": 1, "pruning": RATES},
    "early stopping, halving": {
        **BEST,
        "patience": 2,
        "save_total_limit": 1,
        "pruning": {**RATES, "search": "halving", "halving_factor": 2, "halving_rounds": 2, "rewind": "fresh"},
    },
    "augmented, final training": {
        "save_strategy": "steps",
        "save_steps": 1,
        "augmented": True,
        "gradient_accumulation_steps": 2,
        "warmup_steps": 2,
        "lr_scheduler_type": "cosine",
        "pruning": {**RATES, "tolerance": 10.0},
    },
}
"""Options of a search. In all of them something is random: dropout of prompts, and in the last one the data."""


class Augmented(torch.utils.data.Dataset[dict[str, Any]]):
    """Images with noise that is drawn whenever they are read."""

    def __init__(self, samples: toy.BrightPatch) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.samples[index]
        image = sample["pixel_values"]
        return {**sample, "pixel_values": image + 0.3 * random.random() * torch.randn_like(image)}


def killed_after(
    seconds: float, work: Callable[[], None], ready: Path | None = None, by: signal.Signals = signal.SIGKILL
) -> bool:
    """Kill a process that does this after some time, counted from when a file is there; whether it was still at it."""
    process = child(work)
    while ready is not None and not ready.exists():
        time.sleep(0.05)
    time.sleep(seconds)
    os.kill(process, by)
    return not ended(process)


def search(folder: Path, name: str) -> None:
    """Start or resume a search, and save what it found."""
    options = json.loads(json.dumps(SEARCHES[name]))
    patience = options.pop("patience", None)
    keywords: dict[str, Any] = {}
    if patience is not None:
        keywords["callbacks"] = [EarlyStoppingCallback(patience)]
    if options.pop("augmented", False):
        keywords["train_dataset"] = Augmented(toy.TRAIN)
        keywords["final_train_dataset"] = Augmented(toy.BrightPatch(40, seed=3))
    resume = (folder / STATE).exists()
    trainer, _ = start(folder, Events(float("inf"), lambda: None), resume, **keywords, **options)
    trainer.save_model(str(folder / RESULT))


def phase_of(folder: Path) -> str:
    """What a search that was killed was doing."""
    if not (folder / STATE).exists():
        return "start"
    records = json.loads((folder / STATE).read_text())["records"]
    if (folder / RESULTS).exists():
        return "saving the result"
    if "tune" not in records:
        return "tuning" if "start" in records else "start"
    if "scores" not in records:
        return "scoring"
    return "final training" if (folder / "_pruning_state" / "final").exists() else "candidates"


def check_whole(folder: Path) -> int:
    """Every file with a final name can be read. Unfinished checkpoints of Trainer are told apart when resuming."""
    files = 0
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder).parts
        if any(part.startswith(("checkpoint-", "_saving")) for part in inside) or path.suffix == ".tmp":
            continue
        if path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        else:
            continue
        files += 1
    return files


def check_same(folder: Path, undisturbed: Path) -> None:
    """The table is the same, and every bit of the weights."""
    assert (folder / RESULTS).read_text() == (undisturbed / RESULTS).read_text(), (folder, "another table")
    found, expected = (load_file(path / RESULT / "adapter_model.safetensors") for path in (folder, undisturbed))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), (folder, name)


def kill_searches(folder: Path, kills: int, randomness: random.Random) -> dict[str, Any]:
    """Kill searches, resume them until they are done, and compare with those that were not killed."""
    seconds = {}
    for name in SEARCHES:
        began = time.monotonic()
        assert ended(child(lambda: search(folder / name / "undisturbed", name)))  # noqa: B023  (used at once)
        seconds[name] = time.monotonic() - began
    phases: Counter[str] = Counter()
    signals: Counter[str] = Counter()
    searches: Counter[str] = Counter()
    files = 0
    while phases.total() < kills:
        name = list(SEARCHES)[searches.total() % len(SEARCHES)]
        target = folder / name / str(searches[name])
        run: Callable[[], None] = partial(search, target, name)
        while phases.total() < kills:
            by = randomness.choice(SIGNALS)
            wait = randomness.uniform(0, 0.3 * seconds[name])
            if not killed_after(wait, run, by=by):
                break
            phases[phase_of(target)] += 1
            signals[by.name] += 1
            files += check_whole(target)
        else:
            ended(child(run))
        check_same(target, folder / name / "undisturbed")
        searches[name] += 1
        print(name, phases.total(), "kills, the same", flush=True)
    return {"searches": dict(searches), "kills": dict(phases), "signals": dict(signals), "files read": files}


def kill_saves(folder: Path, kills: int, randomness: random.Random) -> dict[str, Any]:
    """Kill processes that save one adapter over another; what is there is always one of them, whole."""
    target, ready = folder / "saved", folder / "ready"

    def save(forever: bool) -> None:
        trainer = toy.make_trainer(folder / "out")
        prompts = [p for name, p in trainer.model.named_parameters() if "e2vpt_" in name]
        while True:
            for value in (1.0, 2.0):
                for prompt in prompts:
                    prompt.data.fill_(value)
                trainer.save_model(str(target))
            if not forever:
                return
            ready.touch()

    assert ended(child(lambda: save(False)))
    values: Counter[float] = Counter()
    for _ in range(kills):
        ready.unlink(missing_ok=True)
        assert killed_after(randomness.uniform(0, 0.2), lambda: save(True), ready)
        tensors = load_file(target / "adapter_model.safetensors")
        found = {float(value) for name, tensor in tensors.items() if "e2vpt_" in name for value in tensor.unique()}
        assert len(found) == 1 and check_whole(target)
        values[found.pop()] += 1
    PeftModel.from_pretrained(tiny_vit(num_hidden_layers=2), target)
    return {"kills": values.total(), "first adapter left": values[1.0], "second adapter left": values[2.0]}


def run(kills: int, saves: int, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Both, each in a folder of its own."""
    results = {}
    for part, count in ((kill_searches, kills), (kill_saves, saves)):
        with tempfile.TemporaryDirectory() as folder:
            results[part.__name__] = part(Path(folder), count, random.Random(seed))
        print(part.__name__, results[part.__name__], flush=True)
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--saves", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    run(**vars(parser.parse_args()))
