"""Makes accelerate run FSDP2 and DeepSpeed on CPUs, for tests.

accelerate gives the processes of a CPU the type MULTI_CPU, for which it knows nothing but DDP, however it is
configured. This patches the one place where it decides that: gloo's processes are taken for those of GPUs. All that
follows is its own and PyTorch's or DeepSpeed's own code. The device is named by ACCELERATE_TORCH_DEVICE, which accelerate
has for such cases; `use_cpu` must not be set, which is the other way into MULTI_CPU.
"""

from __future__ import annotations

import os

from accelerate.state import DistributedType, PartialState


def allow_shards_on_cpu() -> None:
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)  # type: ignore[method-assign]
