"""What all sides of a comparison share: the size of the model, where it runs, in which type, on which images."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NUM_LABELS = 100


@dataclass(frozen=True)
class Size:
    """The size of a ViT."""

    name: str
    hidden_size: int
    layers: int
    heads: int
    patch_size: int = 16
    image_size: int = 224


SIZES = {
    size.name: size
    for size in (
        Size("toy", 64, 2, 4, patch_size=4, image_size=16),
        Size("ViT-S/16", 384, 12, 6),
        Size("ViT-B/16", 768, 12, 12),
        Size("ViT-L/16", 1024, 24, 16),
    )
}


@dataclass(frozen=True)
class Setup:
    """Where and on what a comparison runs."""

    size: Size
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def batch(self, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Images, (batch size, 3, height, width), and labels, (batch size)."""
        generator = torch.Generator().manual_seed(self.seed)
        images = torch.randn(batch_size, 3, self.size.image_size, self.size.image_size, generator=generator)
        labels = torch.randint(NUM_LABELS, (batch_size,), generator=generator)
        return images.to(self.device, self.dtype), labels.to(self.device)


@dataclass(frozen=True)
class Prompts:
    """Numbers of prompts in each layer, the dropout on the visual ones, and whether key-value prompts are separate and
    beside the attention."""

    visual: int
    kv: int
    dropout: float = 0.0
    beside: bool = False

    @property
    def counts(self) -> tuple[int, int]:
        return self.visual, self.kv

    def __str__(self) -> str:
        dropout = f", dropout {self.dropout:g}" if self.dropout else ""
        return f"({self.visual}, {self.kv}){', GELU' if self.beside else ''}{dropout}"


ALL_BESIDE = Prompts(0, 16, beside=True)
"""What docs/choosing.md starts from: as many parameters as LoRA of rank 8 has, and nothing in the softmax."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of every command that measures."""
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights and images (default: float32)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--rounds", type=int, default=30, help="most rounds of a comparison (default: 30)")
    parser.add_argument(
        "--seconds", type=float, default=60, help="of a comparison, for fewer rounds, but 5 (default: 60)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, images and order (default: 0)")


def setup_of(options: argparse.Namespace, size: Size) -> Setup:
    """The setup that options say; sets the number of threads."""
    if options.threads:
        torch.set_num_threads(options.threads)
    return Setup(size, torch.device(options.device), DTYPES[options.dtype], options.seed)


def prompts_of(text: str) -> Prompts:
    """The prompts of a text like "10,5"."""
    visual, kv = (int(number) for number in text.split(","))
    if visual < 1 or kv < 1:
        raise argparse.ArgumentTypeError(f"'{text}': the comparison needs at least one prompt of each kind.")
    return Prompts(visual, kv)
