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


def launch(folder):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    root = Path(__file__).parents[2]
    script = ["-m", "tests.trainer.distributed", str(folder)]
    return subprocess.run([*command, *script], cwd=root, capture_output=True, text=True, timeout=300)


def same(first, second, tolerance):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=tolerance)


def test_two_processes_do_what_one_does_and_go_on_after_being_killed(tmp_path):
    one, two, killed = (tmp_path / name for name in ("one", "two", "killed"))
    search(str(one), 0, 1, Events(float("inf"), lambda: None)).train()
    killed_process = launch(tmp_path)
    assert killed_process.returncode != 0 and (two / "rank1.safetensors").exists(), killed_process.stderr
    for phase in ("tune", "scores", "candidate-1", "candidate-2"):
        file = f"_pruning_state/{phase}.safetensors"
        same(load_file(two / file), load_file(one / file), 1e-5)
    ranks = [load_file(two / f"rank{rank}.safetensors") for rank in (0, 1)]
    same(*ranks, 0)
    results = json.loads((two / "pruning_results.json").read_text())
    assert results["best"] == json.loads((one / "pruning_results.json").read_text())["best"]
    assert not list(two.rglob("*.tmp"))

    loaded = PeftModel.from_pretrained(tiny_vit(num_hidden_layers=2), two / "result").eval()
    assert loaded(pixel_values=images()).logits.isfinite().all()
    assert sum(loaded.peft_config["default"].token_mask or [True] * 4) == int(ranks[0]["token_mask"].sum())

    records = json.loads((killed / "_pruning_state" / "state.json").read_text())["records"]
    assert "tune" in records and "candidate-1" not in records
    process = launch(tmp_path)
    assert process.returncode == 0, process.stderr
    assert json.loads((killed / "pruning_results.json").read_text()) == results
    for phase in ("tune", "scores", "candidate-1", "candidate-2"):
        file = f"_pruning_state/{phase}.safetensors"
        same(load_file(killed / file), load_file(one / file), 1e-5)
    same(load_file(killed / "rank1.safetensors"), ranks[0], 1e-6)
    assert not list(killed.rglob("*.tmp"))
