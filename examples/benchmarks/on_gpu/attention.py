"""Attention implementations and kernels against eager attention."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..measuring.methods import build_backbone
from ..measuring.setup import Setup
from .cases import Facts, Machine, NotHere
from .checks import adapted, relative_error, results_of

KERNELS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
ROOM = 3.0
"""How many times the error of eager attention in the same type another way may have."""


def check_attention(machine: Machine, implementation: str, kernel: str | None = None) -> Facts:
    """Logits and gradients in bfloat16, as near to float32 as those of eager attention.

    Args:
        machine (`Machine`): Where.
        implementation (`str`): As `set_attn_implementation` takes it.
        kernel (`str`, *optional*): With sdpa, the only kernel that PyTorch may take.
    """
    setup = machine.small(torch.bfloat16)
    images, labels = setup.batch(4)
    exact = Setup(setup.size, setup.device)
    reference = adapted(exact, machine.prompts)
    reference.get_base_model().set_attn_implementation("eager")
    expected = results_of(reference, *exact.batch(4))
    model = adapted(setup, machine.prompts)
    model.get_base_model().set_attn_implementation("eager")
    eager = results_of(model, images, labels)
    with sdpa_kernel(KERNELS[kernel]) if kernel else nullcontext():
        try:
            bare = build_backbone(setup).requires_grad_(True)
            bare.set_attn_implementation(implementation)
            F.cross_entropy(bare(pixel_values=images).logits, labels).backward()
        except (ImportError, NotImplementedError, RuntimeError) as error:
            raise NotHere(f"The backbone alone does not run: {error}") from error
        model.get_base_model().set_attn_implementation(implementation)
        found = results_of(model, images, labels)
    facts = {}
    for name in expected:
        error, of_eager = (relative_error(one[name], expected[name]) for one in (found, eager))
        facts |= {f"error of {name}": error, f"of eager attention, {name}": of_eager}
        if not error < ROOM * of_eager + 1e-3:
            raise AssertionError(f"{name}: {error:.1e} from float32, and eager attention {of_eager:.1e}")
    return facts
