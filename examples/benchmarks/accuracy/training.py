"""Train one model once, fast: all images are on the device, batches are indices, and nothing waits for a number."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from e2vpt_peft import create_optimizer
from examples.data_and_backbone import HEAD

from .checkpoints import Progress
from .images import Images
from .steps import StepMaker, autocast, make_step, on_its_stream

EVALUATION_BATCH = 256


@dataclass(frozen=True)
class Optimisation:
    """How to train.

    Attributes:
        optimizer (`str`): `"adamw"` or `"sgd"` (momentum 0.9).
        learning_rate, weight_decay (`float`): Of all trainable parameters; biases do not decay.
        epochs, batch_size (`int`): How long, and how many images a step. A tenth of the steps is warm-up, then cosine.
        seed (`int`): Of the order of images, dropout and cropping.
        precision (`str`): One of [`steps.PRECISIONS`].
        kv_lr_ratio (`float`, *optional*):
            How many times the learning rate key-value prompts have. Prompts do not decay then, see
            [`~e2vpt_peft.create_optimizer`].
    """

    optimizer: str
    learning_rate: float
    weight_decay: float
    epochs: int
    batch_size: int
    seed: int
    precision: str = "float32"
    kv_lr_ratio: float | None = None


@dataclass(frozen=True)
class Preprocessing:
    """From bytes to what the backbone reads: `size` of its input, mean and deviation of each channel (1, 3, 1, 1)."""

    size: int
    mean: torch.Tensor
    deviation: torch.Tensor

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        return (pixels.float() / 255 - self.mean) / self.deviation

    def for_training(self, pixels: torch.Tensor) -> torch.Tensor:
        """Where images are larger than the input, a random part, every other one mirrored."""
        number, _, height, _ = pixels.shape
        if height > self.size:
            rows, columns = torch.randint(height - self.size + 1, (2, number, 1)) + torch.arange(self.size)
            mirrored = torch.rand(number, 1) < 0.5
            columns = torch.where(mirrored, columns.flip(1), columns)
            index = torch.arange(number)[:, None, None, None]
            place = (index, torch.arange(3)[:, None, None], rows[:, None, :, None], columns[:, None, None, :])
            pixels = pixels[tuple(part.to(pixels.device) for part in place)]
        return self.normalise(pixels)

    def for_evaluation(self, pixels: torch.Tensor) -> torch.Tensor:
        """Where images are larger than the input, the middle."""
        start = (pixels.shape[-1] - self.size) // 2
        return self.normalise(pixels[..., start : start + self.size, start : start + self.size])


def train(
    model: nn.Module,
    images: Images,
    preprocessing: Preprocessing,
    how: Optimisation,
    progress: Progress | None = None,
    step_of: StepMaker | None = None,
) -> None:
    """Train what is trainable. The same arguments give the same weights, as far as the device's kernels repeat.

    Args:
        model (`nn.Module`): Called as a transformers model is.
        images ([`Images`]): To train on.
        preprocessing ([`Preprocessing`]): From these to the model's input.
        how ([`Optimisation`]): The settings.
        progress ([`Progress`], *optional*): Lets it go on where it was killed, and be judged on its way.
        step_of (`Callable`, *optional*): Makes the step, in place of [`steps.make_step`].
    """
    progress = progress or Progress()
    device = images.labels.device
    torch.manual_seed(how.seed)
    optimizer = make_optimizer(model, how, device)
    steps = how.epochs * -(-len(images) // how.batch_size)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    begun = progress.resume(model, optimizer, schedule)
    with on_its_stream(device):
        step = (step_of or make_step)(model, optimizer, how.precision, how.batch_size)
        for epoch in range(begun, how.epochs):
            model.train()
            for chosen in torch.randperm(len(images)).to(device).split(how.batch_size):
                step(preprocessing.for_training(images.pixels[chosen]), images.labels[chosen])
                schedule.step()
            progress.after(epoch + 1, epoch + 1 == how.epochs, model, optimizer, schedule)


def make_optimizer(model: nn.Module, how: Optimisation, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer of all that is trainable."""
    sgd = how.optimizer == "sgd"
    optimizer_cls: Any = torch.optim.SGD if sgd else torch.optim.AdamW
    on_gpu = device.type == "cuda"
    options = {"lr": how.learning_rate, "fused": on_gpu, **({"momentum": 0.9} if sgd else {"capturable": on_gpu})}
    if how.kv_lr_ratio is not None:
        return create_optimizer(
            model, optimizer_cls, kv_prompt_lr_ratio=how.kv_lr_ratio, weight_decay=how.weight_decay, **options
        )
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in trainable if not name.endswith("bias")], "weight_decay": how.weight_decay},
        {"params": [p for name, p in trainable if name.endswith("bias")], "weight_decay": 0.0},
    ]
    optimizer: torch.optim.Optimizer = optimizer_cls(groups, **options)
    return optimizer


def batches(images: Images, preprocessing: Preprocessing) -> Iterator[dict[str, torch.Tensor]]:
    """All images as they are evaluated, as inputs of the model."""
    for pixels, labels in zip(images.pixels.split(EVALUATION_BATCH), images.labels.split(EVALUATION_BATCH)):
        yield {"pixel_values": preprocessing.for_evaluation(pixels), "labels": labels}


@torch.inference_mode()
def accuracy(model: nn.Module, images: Images, preprocessing: Preprocessing, precision: str = "float32") -> float:
    """The share of images that are classified correctly."""
    model.eval()
    right = torch.zeros((), device=images.labels.device)
    for batch in batches(images, preprocessing):
        with autocast(images.labels.device, precision):
            logits = model(pixel_values=batch["pixel_values"]).logits
        right += (logits.argmax(1) == batch["labels"]).sum()
    return float(right) / len(images)


class Probe(nn.Module):
    """The head alone, on features in place of images, called as the whole model is."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, pixel_values: torch.Tensor) -> Logits:
        return Logits(self.head(pixel_values))


@dataclass
class Logits:
    """What a model returns, as far as it is needed here."""

    logits: torch.Tensor


@torch.no_grad()
def features(model: nn.Module, images: Images, preprocessing: Preprocessing, precision: str = "float32") -> Images:
    """What the head reads of each image, in place of its pixels."""
    model.eval()
    found: list[torch.Tensor] = []
    hook = model.get_submodule(HEAD).register_forward_pre_hook(lambda head, inputs: found.append(inputs[0].float()))
    for batch in batches(images, preprocessing):
        with autocast(images.labels.device, precision):
            model(pixel_values=batch["pixel_values"])
    hook.remove()
    return Images(torch.cat(found), images.labels)


class Identity(Preprocessing):
    """For features, which are read as they are."""

    def __init__(self) -> None:
        super().__init__(0, torch.zeros(()), torch.ones(()))

    def for_training(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels

    def for_evaluation(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels
