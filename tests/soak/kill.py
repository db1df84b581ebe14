"""SIGKILL at random moments of tuning, scoring, pruning and saving: what comes out is what an undisturbed run gives.

As a script: `python -m tests.soak.kill --kills 200 --saves 200`. Children are forked, since importing takes longer
than a search.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file

from ..support.models import tiny_vit
from ..trainer import toy
from ..trainer.interrupted import Events, start

STATE, RESULTS, RESULT = "_pruning_state/state.json", "pruning_results.json", "result"
OPTIONS: dict[str, Any] = {
    "save_strategy": "steps",
    "save_steps": 3,
    "pruning": {"token_rates": [0.25, 0.5], "segment_rates": [0.0, 0.5], "importance": "leave_one_out"},
}


def child(work: Callable[[], None]) -> int:
    """Start a process that does this and ends."""
    process = os.fork()
    if process == 0:
        errors = os.fdopen(os.dup(2), "w")
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        try:
            torch.set_num_threads(1)
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc(file=errors)
            errors.flush()
            os._exit(1)
    return process


def ended(process: int) -> bool:
    """Wait for a child; whether it came to its end. It must not fail."""
    _, status = os.waitpid(process, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the child failed"
    return not os.WIFSIGNALED(status)


def killed_after(seconds: float, work: Callable[[], None], ready: Path | None = None) -> bool:
    """Kill a process that does this after some time, counted from when a file is there; whether it was still at it."""
    process = child(work)
    while ready is not None and not ready.exists():
        time.sleep(0.05)
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)
    return not ended(process)


def search(folder: Path) -> None:
    """Start or resume a search, and save what it found."""
    resume = (folder / STATE).exists()
    trainer, _ = start(folder, Events(float("inf"), lambda: None), resume, **json.loads(json.dumps(OPTIONS)))
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
    return "candidates" if "scores" in records else "scoring"


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


def kill_searches(folder: Path, kills: int, randomness: random.Random) -> dict[str, Any]:
    """Kill searches, resume them until they are done, and compare with one that was not killed."""
    undisturbed = folder / "undisturbed"
    began = time.monotonic()
    assert ended(child(lambda: search(undisturbed)))
    seconds = time.monotonic() - began
    expected = load_file(undisturbed / RESULT / "adapter_model.safetensors")
    phases: Counter[str] = Counter()
    searches = files = 0
    while phases.total() < kills:
        target = folder / f"search-{searches}"
        while killed_after(randomness.uniform(0, seconds), lambda: search(target)):  # noqa: B023  (used at once)
            phases[phase_of(target)] += 1
            files += check_whole(target)
        assert (target / RESULTS).read_text() == (undisturbed / RESULTS).read_text()
        for name, tensor in load_file(target / RESULT / "adapter_model.safetensors").items():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)
        searches += 1
    return {"searches": searches, "kills": dict(phases), "files read": files}


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
