"""Three tasks, three adapters, one backbone: train them, then answer a batch in which every sample has its own task.

    python examples/many_adapters.py

Offline, in about half a minute on one core. The tasks, on scikit-learn's handwritten digits: which digit, whether it
is even, whether it is turned upside down. All heads have ten classes, of which the last two tasks use two.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForImageClassification, set_seed
from transformers.utils import logging

from e2vpt_peft import E2VPTConfig

BACKBONE = Path(__file__).parent / "backbone"
Task = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def upside_down(images: torch.Tensor, digits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Every other image is turned by 180 degrees."""
    turned = torch.arange(len(images)) % 2
    return torch.where(turned.bool()[:, None, None, None], images.flip(-1, -2), images), turned


TASKS: dict[str, Task] = {
    "digit": lambda images, digits: (images, digits),
    "even": lambda images, digits: (images, (digits + 1) % 2),
    "upside_down": upside_down,
}
"""From images and digits to images and labels."""


def load_images(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """scikit-learn's digits, as images of the backbone's size with values in [-1, 1], and which digits they are."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(images, size=size, mode="bilinear").repeat(1, 3, 1, 1)
    return images, torch.tensor(digits.target)


def make_model() -> PeftModel:
    """The backbone with an untrained adapter for every task."""
    vit = AutoModelForImageClassification.from_pretrained(BACKBONE, num_labels=10, ignore_mismatched_sizes=True)
    config = [E2VPTConfig(prompt_dropout=0.0, modules_to_save=["classifier"]) for _ in TASKS]
    first, *others = TASKS
    model: PeftModel = get_peft_model(vit, config[0], adapter_name=first)
    for name, own in zip(others, config[1:]):
        model.add_adapter(name, own)
    return model


def train(model: PeftModel, adapter: str, images: torch.Tensor, labels: torch.Tensor, epochs: int) -> None:
    """Train one adapter; the others stay as they are."""
    model.set_adapter(adapter)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    model.train()
    for _ in range(epochs):
        for pixel_values, targets in DataLoader(TensorDataset(images, labels), batch_size=32, shuffle=True):
            model(pixel_values=pixel_values, labels=targets).loss.backward()
            optimizer.step()
            optimizer.zero_grad()


@torch.no_grad()
def answers(model: PeftModel, images: torch.Tensor, adapters: list[str]) -> torch.Tensor:
    """The logits of each image by its own adapter."""
    model.eval()
    return model(pixel_values=images, adapter_names=adapters).logits


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, answer mixed batches, and compare with one task at a time. Returns the accuracy of each task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_images", type=int, default=400, help="Images to train on, of 1,797.")
    parser.add_argument("--test_images", type=int, default=300, help="Images to test on, from the end.")
    parser.add_argument("--epochs", type=int, default=6, help="Epochs for each adapter.")
    args = parser.parse_args(argv)
    logging.set_verbosity_error()  # of the new head, which the checkpoint does not have
    set_seed(0)
    model = make_model()
    images, digits = load_images(model.config.image_size)
    for name, task in TASKS.items():
        train(model, name, *task(images[: args.train_images], digits[: args.train_images]), args.epochs)

    tests = {name: task(images[-args.test_images :], digits[-args.test_images :]) for name, task in TASKS.items()}
    # Image by image, one of each task after the other: no two neighbours have the same adapter.
    batch = torch.stack([tests[name][0] for name in TASKS], 1).flatten(0, 1)
    mixed = answers(model, batch, list(TASKS) * args.test_images).unflatten(0, (args.test_images, len(TASKS)))
    accuracy = {}
    print(f"{'adapter':<14}{'accuracy':>10}   largest difference of logits, mixed batch and alone")
    for number, name in enumerate(TASKS):
        alone = answers(model, tests[name][0], [name] * args.test_images)
        difference = (mixed[:, number] - alone).abs().max().item()
        accuracy[name] = (mixed[:, number].argmax(-1) == tests[name][1]).float().mean().item()
        print(f"{name:<14}{accuracy[name]:>10.1%}   {difference:.1g}")
        torch.testing.assert_close(mixed[:, number], alone, atol=1e-4, rtol=1e-4)
    return accuracy


if __name__ == "__main__":
    main()
