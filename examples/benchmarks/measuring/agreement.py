"""What is compared must compute the same, or comparing its speed means nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import PeftModel
from torch import nn

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, as a share of the largest value, but at least of 1."""
    ours, theirs = ours.float(), theirs.float()
    return (ours - theirs).abs().max().item() / max(1.0, theirs.abs().max().item())


def check_close(ours: torch.Tensor, theirs: torch.Tensor, dtype: torch.dtype, what: str) -> float:
    """Make sure that two results are the same as far as a type can tell; returns their [`difference`].

    Raises:
        AssertionError: They are not, or not finite.
    """
    found = difference(ours, theirs)
    if not found <= TOLERANCE[dtype]:
        raise AssertionError(f"{what} differ by {found:.1e}, more than the {TOLERANCE[dtype]:.0e} of {dtype}.")
    return found


@torch.inference_mode()
def check_same_function(e2vpt: PeftModel, inserted: nn.Module, images: torch.Tensor) -> float:
    """Make sure that two models with the same prompts give the same logits."""
    ours, theirs = (model.eval()(pixel_values=images).logits for model in (e2vpt, inserted))
    return check_close(ours, theirs, images.dtype, "E²VPT and token insertion with the same prompts")


@torch.inference_mode()
def check_mixed_batch(model: PeftModel, images: torch.Tensor, names: Sequence[str]) -> float:
    """Make sure that the samples of the first adapter get the same logits in a mixed batch as alone."""
    model.eval().set_adapter(names[0])
    rows = [row for row, name in enumerate(names) if name == names[0]]
    mixed = model(pixel_values=images, adapter_names=list(names)).logits[rows]
    alone = model(pixel_values=images).logits[rows]
    return check_close(mixed, alone, images.dtype, "A mixed batch and one adapter alone")
