"""What the card can do at best, for shares of it."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from .cases import Facts, Machine

MATMUL, COPY, FLOPS = "matmul, TFLOP/s", "copy, GB/s", "backbone, GFLOP per image"


def measure_peak(machine: Machine) -> Facts:
    """The rate of a large product of random bfloat16 matrices and of a large copy, and what a backbone needs."""
    side = 128 if machine.toy else 8192
    one, other = (torch.randn(side, side, device=machine.device, dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(one)
    size = 2**16 if machine.toy else 2**30
    source = torch.randint(256, (size,), device=machine.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    times = machine.time(
        {"matmul": lambda: torch.mm(one, other, out=product), "copy": lambda: target.copy_(source)}, least_seconds=0.1
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        machine.backbone(pixel_values=machine.setup.batch(1)[0])
    return {
        MATMUL: 2 * side**3 / min(times["matmul"]) / 1e12,
        COPY: 2 * size / min(times["copy"]) / 1e9,  # read and written
        FLOPS: counter.get_total_flops() / 1e9,
    }
