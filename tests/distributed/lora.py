"""LoRA, without any code of the package, goes on from a checkpoint: `-m tests.distributed.lora FOLDER`.

accelerate before 1.15 does not do that right with FSDP2: in 1.7 and 1.8 the first process alone reads the adapter, and
1.10 to 1.14 raise an error where there is a classifier beside it. Our tests are skipped where LoRA fails as well.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import accelerate
import torch
from accelerate import PartialState
from accelerate.utils import compare_versions
from peft import LoraConfig, PeftModel, get_peft_model

from ..support.models import tiny_vit
from .on_cpu import allow_shards_on_cpu, launch
from .train import train


def with_lora(seed: int) -> PeftModel:
    torch.manual_seed(seed)
    return get_peft_model(
        tiny_vit(num_hidden_layers=2),
        LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"]),
    )  # type: ignore


@functools.cache
def fault_of_resuming(config: str) -> str | None:
    """What is wrong with going on from a checkpoint in an accelerate older than 1.15, or `None` if nothing is seen."""
    if compare_versions("accelerate", ">=", "1.15"):
        return None
    with tempfile.TemporaryDirectory() as folder:
        process = launch(config, "tests.distributed.lora", folder)
        losses = [Path(folder, run, "losses.json") for run in ("whole", "resumed")]
        assert losses[0].exists(), process.stderr  # it trains
        if losses[1].exists():
            whole, resumed = (torch.tensor(json.loads(file.read_text())) for file in losses)
            error = (whole - resumed).abs().max().item()
            seen = None if error < 1e-5 else f"losses {error:.2g} from those of a run that was not interrupted"
        else:
            seen = "an error"
    return seen and f"accelerate {accelerate.__version__} gives {seen} to LoRA as well, {config}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    target, processes = Path(sys.argv[1]), int(os.environ["WORLD_SIZE"])
    use_cpu = not allow_shards_on_cpu()
    train(str(target / "whole"), processes, adapt=with_lora, use_cpu=use_cpu)
    if PartialState().is_main_process:
        shutil.copytree(target / "whole" / "checkpoint-3", target / "resumed" / "checkpoint-3")
    PartialState().wait_for_everyone()
    train(str(target / "resumed"), processes, resume=True, adapt=with_lora, use_cpu=use_cpu)
