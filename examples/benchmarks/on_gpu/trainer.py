"""A pruning search under `accelerate launch`, killed on its way and resumed."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .cases import Facts, Machine, NotHere
from .repository import ROOT, environment

KILLED_AT = 30
"""Steps, evaluations and writes until the search kills itself: in the middle of a candidate."""


def check_search(machine: Machine, precision: str) -> Facts:
    """`E2VPTTrainer` finds the same after `kill -9` as without, in mixed precision.

    Args:
        machine (`Machine`): Where.
        precision (`str`): "bf16" or "fp16".
    """
    on_cpu = machine.device.type == "cpu"
    if on_cpu and precision == "fp16":
        raise NotHere("Trainer has fp16 on GPUs only")
    options = {"use_cpu": on_cpu, precision: True, "save_strategy": "epoch"}
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder, "whole"), Path(folder, "killed")
        running = [start(whole, float("inf"), options), start(killed, KILLED_AT, options)]
        outputs = [process.communicate(timeout=max(1, machine.seconds_left))[0] for process in running]
        expect(running[0].returncode == 0, "The search failed", outputs[0])
        results = killed / "pruning_results.json"
        expect(running[1].returncode != 0 and not results.exists(), "The search was not killed", outputs[1])
        again = start(killed, float("inf"), options)
        output = again.communicate(timeout=max(1, machine.seconds_left))[0]
        expect(again.returncode == 0, "The killed search could not be resumed", output)
        tables = [json.loads((path / "pruning_results.json").read_text()) for path in (whole, killed)]
    one, other = ({row["name"]: row["metric"] for row in table["candidates"]} for table in tables)
    # On a GPU sums come in any order, so that no two runs need be the same to the last digit.
    close = one.keys() == other.keys() and all(abs(one[name] - other[name]) <= 0.02 * abs(one[name]) for name in one)
    expect(close, f"Metrics are {one} but, resumed, {other}", "")
    return {"candidates": len(one), "the same to the last digit": one == other}


def start(folder: Path, events: float, options: dict[str, Any]) -> subprocess.Popen[str]:
    """Start a search that kills itself after some events; that of the tests, which does so."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "--num_machines=1"]
    launch += ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
    launch += ["--cpu"] if options["use_cpu"] else []
    command = [*launch, "-m", "tests.trainer.interrupted", str(folder), str(events), json.dumps(options)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def expect(condition: bool, message: str, output: str) -> None:
    if not condition:
        raise AssertionError(f"{message}: {output[-2000:]}")
