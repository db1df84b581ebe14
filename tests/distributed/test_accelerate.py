"""`accelerate launch` with the config files of examples/accelerate, on two processes of a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file

from ..models import images, tiny_vit
from .train import train

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "examples" / "accelerate"


def launch(folder, **options):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "cpu.yaml")]
    command += ["--main_process_port", "0"]  # any that is free
    command += ["-m", "tests.distributed.train", str(folder), json.dumps(options)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr


def losses(folder):
    return torch.tensor(json.loads((folder / "losses.json").read_text()))


def assert_same_adapter(first, second):
    files = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (first, second)]
    assert files[0].keys() == files[1].keys()
    for name in files[0]:
        torch.testing.assert_close(files[0][name], files[1][name], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_two_processes_do_what_one_does_and_resume_each_others_work(tmp_path):
    one, two, resumed = tmp_path / "one", tmp_path / "two", tmp_path / "resumed"
    train(str(one), processes=1)
    launch(two)
    torch.testing.assert_close(losses(two), losses(one), rtol=0, atol=1e-5)
    assert_same_adapter(two, one)

    model = PeftModel.from_pretrained(tiny_vit(num_hidden_layers=2), two / "adapter")
    reference = PeftModel.from_pretrained(tiny_vit(num_hidden_layers=2), one / "adapter")
    torch.testing.assert_close(model(images()).logits, reference(images()).logits, rtol=1e-5, atol=1e-5)

    # Two processes go as far as step 3, one goes on from there.
    resumed.mkdir()
    (two / "checkpoint-3").rename(resumed / "checkpoint-3")
    train(str(resumed), processes=1, resume=True)
    torch.testing.assert_close(losses(resumed), losses(one), rtol=0, atol=1e-5)
    assert_same_adapter(resumed, one)


@pytest.mark.slow
def test_gradient_accumulation_and_mixed_precision_on_two_processes(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    options = {"gradient_accumulation_steps": 2, "bf16": True}
    train(str(one), processes=1, **options)
    launch(two, **options)
    # Sums of bfloat16 come out a little differently in batches of another size.
    torch.testing.assert_close(losses(two), losses(one), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_config_files_are_what_accelerate_understands(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    given = yaml.safe_load(path.read_text())
    assert config.distributed_type.value == given["distributed_type"]
    assert config.num_processes == 2
