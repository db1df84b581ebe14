"""Makes accelerate run FSDP2 and DeepSpeed on the processes of a CPU.

accelerate has both on accelerators only. Processes that talk by gloo are of type MULTI_CPU for it, for which it knows
nothing but DDP, whatever its config file says. Patched here is what it, or transformers, asks before:

- the type of processes, which is said to be that of GPUs (their device is what ACCELERATE_TORCH_DEVICE says, which is
  accelerate's own variable);
- whether the GPUs know bfloat16;
- for DeepSpeed, an extension for shared memory, which it would compile now: gloo does without.

All that shards, trains, saves and resumes is the code of accelerate, transformers, PyTorch and DeepSpeed.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from accelerate.state import DistributedType, PartialState
from accelerate.utils import parse_flag_from_env
from torch.distributed.fsdp import FSDPModule
from transformers import training_args

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "examples" / "accelerate"
DEEPSPEED = Path(sys.prefix, "deepspeed")  # aside (see the Makefile): transformers imports it wherever it finds it
NEEDS_DEEPSPEED = f"DeepSpeed is not in {DEEPSPEED}: see the Makefile"


def launch(config: str, module: str, *arguments: str, processes: int = 2, **options: str) -> Any:
    """`accelerate launch` with a config file of examples/accelerate, whose precision is float32 unless given."""
    options = {"mixed_precision": "no", "num_processes": str(processes), "main_process_port": "0", **options}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml")]
    command += [part for name, value in options.items() for part in (f"--{name}", value)]
    environment = dict(os.environ)
    if config.startswith("deepspeed"):
        environment["PYTHONPATH"] = os.pathsep.join([str(DEEPSPEED), environment.get("PYTHONPATH", "")])
    return subprocess.run(
        [*command, "-m", module, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def allow_shards_on_cpu() -> bool:
    """To be called first in a process that was launched with FSDP or DeepSpeed; whether it was."""
    deepspeed = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
    if not (deepspeed or parse_flag_from_env("ACCELERATE_USE_FSDP")):
        return False
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)  # type: ignore[method-assign]
    training_args.is_torch_bf16_gpu_available = lambda: True  # type: ignore[attr-defined]
    if deepspeed:
        os.environ["DS_ACCELERATOR"] = "cpu"
        # `from deepspeed.comm import torch` is PyTorch, which that package has imported by this name.
        deepspeed_backend: Any = importlib.import_module("deepspeed.comm.torch")
        deepspeed_backend.build_shm_op = lambda: None
    return True


def engine(model: Any) -> str:
    """What a model is trained by, as its config file is called."""
    if isinstance(model, FSDPModule):
        return "fsdp2"
    if type(model).__name__ == "DeepSpeedEngine":
        return f"deepspeed_zero{model.zero_optimization_stage()}"
    return type(model).__name__
