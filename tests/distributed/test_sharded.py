from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from ..support.models import images, tiny_vit
from .sharded import DEPTHS, make_model, prune, steps


@pytest.fixture(scope="module")
def on_two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    command += ["-m", "tests.distributed.sharded", str(folder)]
    root = Path(__file__).parents[2]
    process = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("depth", DEPTHS)
def test_shards_on_two_processes_do_what_one_process_does(depth, on_two_processes):
    folder = on_two_processes / depth
    model = make_model(depth)
    expected = steps(model)
    prune(model)
    expected += steps(model)
    results = json.loads((folder / "results.json").read_text())
    torch.testing.assert_close(torch.tensor(results["losses"]), torch.tensor(expected), rtol=0, atol=1e-5)
    assert expected[5] < expected[0]
    loaded = PeftModel.from_pretrained(tiny_vit(num_hidden_layers=2), folder)
    assert loaded.peft_config["default"].token_mask == model.peft_config["default"].token_mask
    assert sum(loaded.peft_config["default"].token_mask) == 2
    torch.testing.assert_close(loaded(images()).logits, model.eval()(images()).logits, rtol=1e-4, atol=1e-4)

    # What a sharded model would not notice is refused before anything is changed.
    assert len(results["refusals"]) == 3
    assert all("The model is in shards" in message for message in results["refusals"])
    assert results["masks"] == [None]
