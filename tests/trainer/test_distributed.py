from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from ..support.models import images, tiny_vit
from .distributed import search
from .interrupted import Events

pytestmark = pytest.mark.slow


def launch(folder, seed, last_event=float("inf")):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    root = Path(__file__).parents[2]
    script = ["-m", "tests.trainer.distributed", str(folder), str(seed), str(last_event)]
    return subprocess.run([*command, *script], cwd=root, capture_output=True, text=True, timeout=300)


def same(first, second, tolerance):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=tolerance)


def test_two_processes_that_are_killed_go_on_and_find_what_one_does(tmp_path):
    one, killed = tmp_path / "one", tmp_path / "killed"
    search(str(one), 0, 1, Events(float("inf"), lambda: None)).train()
    process = launch(killed, seed=0, last_event=18)  # in the second epoch of the first candidate
    assert process.returncode != 0
    records = json.loads((killed / "_pruning_state" / "state.json").read_text())["records"]
    assert "tune" in records and "candidate-1" not in records, process.stderr

    process = launch(killed, seed=7)  # from other initial values, of which nothing may be left
    assert process.returncode == 0, process.stderr
    for phase in ("tune", "scores", "candidate-1", "candidate-2"):
        file = f"_pruning_state/{phase}.safetensors"
        same(load_file(killed / file), load_file(one / file), 1e-5)
    ranks = [load_file(killed / f"rank{rank}.safetensors") for rank in (0, 1)]
    same(*ranks, 0)
    results = json.loads((killed / "pruning_results.json").read_text())
    assert results["best"] == json.loads((one / "pruning_results.json").read_text())["best"]
    assert not list(killed.rglob("*.tmp"))

    loaded = PeftModel.from_pretrained(tiny_vit(num_hidden_layers=2), killed / "result").eval()
    assert loaded(pixel_values=images()).logits.isfinite().all()
    assert sum(loaded.peft_config["default"].token_mask or [True] * 4) == int(ranks[0]["token_mask"].sum())
