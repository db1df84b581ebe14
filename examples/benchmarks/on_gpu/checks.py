"""Results on the card: against float32 on the CPU, and against each other."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from peft import PeftModel

from e2vpt_peft import E2VPTConfig

from ..measuring.agreement import check_close
from ..measuring.calls import TrainingStep, inference
from ..measuring.methods import HEAD, build_backbone, build_e2vpt
from ..measuring.setup import DTYPES, Prompts, Setup
from .cases import Facts, Machine

LIMITS = {torch.float32: 5e-3, torch.bfloat16: 1e-1, torch.float16: 2e-2}
"""How far results may be from float32 on the CPU, as a share of their norm.

Gradients of ViT-S/16 are 3e-4 off with a patch embedding in TF32, as cuDNN convolves (simulated by rounding on the
CPU), 2.4e-2 in bfloat16 and 2.6e-3 in float16 (on the CPU): a GPU, which sums in another order, has some room more.
"""


@torch.no_grad()
def adapted(setup: Setup, prompts: Prompts, adapters: tuple[str, ...] = ("one",)) -> PeftModel:
    """E²VPT with prompts large enough to change the result as trained ones do, the same on every device."""
    model = build_e2vpt(build_backbone(setup), prompts, adapters)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "e2vpt_" in name or "modules_to_save" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


def results_of(model: PeftModel, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits, and the gradients of all prompts in one vector, as float32 on the CPU."""
    model.eval().zero_grad()
    logits = model(pixel_values=images).logits
    F.cross_entropy(logits.float(), labels).backward()
    prompts = [p for name, p in model.named_parameters() if "e2vpt_" in name and p.requires_grad]
    gradients = [prompt.grad.float().flatten() for prompt in prompts]
    return {"logits": logits.detach().float().cpu(), "gradients": torch.cat(gradients).cpu()}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def check_precision(machine: Machine, dtype: str) -> Facts:
    """Logits and gradients are those of float32 on the CPU, as far as the type can tell."""
    setup = machine.small(DTYPES[dtype])
    cpu = Setup(setup.size)
    expected = results_of(adapted(cpu, machine.prompts), *cpu.batch(4))
    found = results_of(adapted(setup, machine.prompts), *setup.batch(4))
    errors = {f"error of {name}": relative_error(found[name], expected[name]) for name in expected}
    limit = LIMITS[setup.dtype]
    if not all(error < limit for error in errors.values()):
        raise AssertionError(f"{errors}, more than the {limit:.0e} of {dtype}")
    return errors


def check_autocast(machine: Machine, dtype: str) -> Facts:
    """Training in float32 under autocast, with scaled gradients where the type needs it, lowers the loss."""
    setup = machine.small(torch.float32)
    images, labels = setup.batch(8)
    model = build_e2vpt(build_backbone(setup), machine.prompts).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    scaler = torch.amp.GradScaler(setup.device.type, enabled=dtype == "float16")
    losses = []
    for _ in range(12):
        with torch.autocast(setup.device.type, DTYPES[dtype]):
            loss = F.cross_entropy(model(pixel_values=images).logits, labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    if not losses[-1] < 0.9 * losses[0]:
        raise AssertionError(f"The loss goes from {losses[0]:.3f} to {losses[-1]:.3f}.")
    return {"first loss": losses[0], "last loss": losses[-1]}


@torch.inference_mode()
def check_mixed_batch(machine: Machine) -> Facts:
    """Samples of adapters of unequal size, and of none, get what each gets alone."""
    setup = machine.small(torch.bfloat16)
    model = adapted(setup, machine.prompts, ("one", "two"))
    model.add_adapter("small", E2VPTConfig(num_visual_prompts=1, modules_to_save=HEAD), autocast_adapter_dtype=False)
    names = ["small", "__base__", "two", "one", "one", "small"]
    images, _ = setup.batch(len(names))
    model.eval()
    mixed = model(pixel_values=images, adapter_names=names).logits
    errors = {}
    for name in dict.fromkeys(names):
        rows = [row for row, other in enumerate(names) if other == name]
        if name == "__base__":
            with model.disable_adapter():
                alone = model(pixel_values=images).logits
        else:
            model.set_adapter(name)
            alone = model(pixel_values=images).logits
        errors[name] = check_close(mixed[rows], alone[rows], setup.dtype, f"A mixed batch and '{name}' alone")
    return errors


def check_kept_prefixes(machine: Machine) -> Facts:
    """What inference keeps is never stale: its results are those of a pass that keeps nothing, after every change."""
    setup = machine.small(torch.float32)
    images, labels = setup.batch(4)
    model = adapted(setup, machine.prompts, ("one", "two"))
    step = TrainingStep(model, images, labels)

    def train() -> None:
        model.train()
        step()

    def change_in_place() -> None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "e2vpt_" in name:
                    parameter.mul_(1.5)

    changes: dict[str, Callable[[], object]] = {
        "nothing": lambda: None,
        "an optimiser step": train,
        "another adapter": lambda: model.set_adapter("two"),
        "a change in place": change_in_place,
        "the first adapter": lambda: model.set_adapter("one"),
        "half precision and back": lambda: model.to(torch.bfloat16).to(torch.float32),
        "the CPU and back": lambda: model.to("cpu").to(setup.device),
    }
    errors = {}
    for name, change in changes.items():
        change()
        kept = inference(model, images)
        kept()
        with_gradients = model(pixel_values=images).logits.detach()  # for which nothing is kept
        errors[f"after {name}"] = check_close(kept(), with_gradients, setup.dtype, f"Results after {name}")
    return errors
