"""Semantic segmentation with visual prompts: a dense head on the patches, which never notice the prompts.

    python examples/segmentation.py

Offline, in about half a minute on one core. The images are drawn: discs, squares and crosses on a noisy ground, and
every pixel is to be told what it belongs to. A linear head turns each patch's features into the classes of its
pixels. It is trained alone on the frozen backbone, then together with prompts.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import ViTConfig, ViTModel, ViTPreTrainedModel, set_seed
from transformers.modeling_outputs import SemanticSegmenterOutput
from transformers.utils import logging

from e2vpt_peft import E2VPTConfig

BACKBONE = Path(__file__).parent / "backbone"
CLASSES = ["ground", "disc", "square", "cross"]


class PatchSegmenter(ViTPreTrainedModel):
    """A ViT with a linear layer from each patch to the classes of its pixels."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config)
        self.vit = ViTModel(config, add_pooling_layer=False)
        self.head = nn.Linear(config.hidden_size, config.num_labels * config.patch_size**2)
        self.post_init()

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Any
    ) -> SemanticSegmenterOutput:
        """Logits of shape (images, classes, height, width)."""
        states = self.vit(pixel_values, interpolate_pos_encoding=True, **kwargs).last_hidden_state
        height, width = (side // self.config.patch_size for side in pixel_values.shape[-2:])
        patches = self.head(states[:, 1:]).transpose(1, 2).unflatten(-1, (height, width))
        logits = F.pixel_shuffle(patches, self.config.patch_size)
        return SemanticSegmenterOutput(loss=None if labels is None else F.cross_entropy(logits, labels), logits=logits)


def draw(count: int, size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images, (count, 3, size, size) in [-1, 1], of three shapes, and the class of each pixel."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    images = torch.rand(count, 3, size, size, generator=generator) * 0.6
    labels = torch.zeros(count, size, size, dtype=torch.long)
    for image, label in zip(images, labels):
        for kind in (torch.randperm(len(CLASSES) - 1, generator=generator) + 1).tolist():
            radius = int(torch.randint(size // 8, size // 5 + 1, (1,), generator=generator))
            cy, cx = torch.randint(radius, size - radius, (2,), generator=generator).tolist()
            dy, dx = (y - cy).abs(), (x - cx).abs()
            far, near = torch.maximum(dy, dx), torch.minimum(dy, dx)
            inside = [dy**2 + dx**2 <= radius**2, far <= radius * 0.9, (far <= radius) & (near <= radius / 3)][
                kind - 1
            ]
            colour = 0.4 + 0.6 * torch.rand(3, 1, generator=generator)
            image[:, inside] = colour + 0.1 * torch.randn(3, int(inside.sum()), generator=generator)
            label[inside] = kind
    return images.clamp(0, 1) * 2 - 1, labels


def train(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, epochs: int) -> None:
    """AdamW on what is trainable."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    model.train()
    for _ in range(epochs):
        for pixel_values, targets in DataLoader(TensorDataset(images, labels), batch_size=16, shuffle=True):
            model(pixel_values=pixel_values, labels=targets).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        schedule.step()


@torch.no_grad()
def mean_iou(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Intersection over union, the mean over the classes."""
    model.eval()
    predicted = torch.cat([model(pixel_values=part).logits.argmax(1) for part in images.split(32)])
    ious = []
    for number in range(len(CLASSES)):
        mine, right = predicted == number, labels == number
        ious.append(((mine & right).sum() / (mine | right).sum().clamp(min=1)).item())
    return sum(ious) / len(ious)


def load_model() -> PatchSegmenter:
    """The backbone with a new head, the same at every call."""
    set_seed(0)
    return PatchSegmenter.from_pretrained(BACKBONE, num_labels=len(CLASSES))


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train both, and print the mean IoU of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=48, help="Height and width of the images.")
    parser.add_argument("--train_images", type=int, default=200, help="Images to train on.")
    parser.add_argument("--test_images", type=int, default=100, help="Images to test on.")
    parser.add_argument("--epochs", type=int, default=8, help="Epochs, for both.")
    args = parser.parse_args(argv)
    logging.set_verbosity_error()  # of the new head, which the checkpoint does not have
    training, test = draw(args.train_images, args.size, seed=1), draw(args.test_images, args.size, seed=2)

    probe = load_model()
    probe.requires_grad_(False)
    probe.head.requires_grad_(True)
    train(probe, *training, args.epochs)

    prompted = get_peft_model(load_model(), E2VPTConfig(prompt_dropout=0.0, modules_to_save=["head"]))
    train(prompted, *training, args.epochs)

    results = {"linear head": mean_iou(probe, *test), "with E²VPT": mean_iou(prompted, *test)}
    print(f"mean IoU on {args.test_images} images of {args.size} x {args.size} pixels")
    for name, iou in results.items():
        print(f"{name:<14}{iou:.1%}")
    return results


if __name__ == "__main__":
    main()
