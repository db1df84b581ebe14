"""Pruning step by step, in a training loop of one's own: tune, score, look, prune, rewind, tune again, save, load.

    python examples/pruning.py

Offline, in about half a minute on one core: the backbone that comes with the repository reads scikit-learn's
handwritten digits. `E2VPTTrainer` does all of this, and tries many rates: see docs/pruning.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForImageClassification, PreTrainedModel, set_seed
from transformers.utils import logging

from e2vpt_peft import E2VPTConfig, prune_prompts, rewind_prompts, score_prompts

BACKBONE = Path(__file__).parent / "backbone"


def load_backbone() -> PreTrainedModel:
    """The frozen part, with a new head."""
    set_seed(0)
    return AutoModelForImageClassification.from_pretrained(BACKBONE, num_labels=10, ignore_mismatched_sizes=True)


def load_images(size: int) -> TensorDataset:
    """scikit-learn's digits, as images of the backbone's size with values in [-1, 1]."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(images, size=size, mode="bilinear").repeat(1, 3, 1, 1)
    return TensorDataset(images, torch.tensor(digits.target))


def train(model: PeftModel, data: TensorDataset, epochs: int) -> None:
    """AdamW on prompts and head. The optimizer is made here, after pruning: pruning makes new parameters."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    model.train()
    for _ in range(epochs):
        for images, labels in DataLoader(data, batch_size=32, shuffle=True):
            model(pixel_values=images, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        schedule.step()


@torch.no_grad()
def accuracy(model: PeftModel, data: TensorDataset) -> float:
    """The share of images that are read right."""
    images, labels = data.tensors
    model.eval()
    return (model(pixel_values=images).logits.argmax(-1) == labels).float().mean().item()


def main(argv: list[str] | None = None) -> dict[str, float]:
    """All steps; returns the accuracy after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_images", type=int, default=300, help="Images to train on, of 1,797.")
    parser.add_argument("--test_images", type=int, default=500, help="Images to test on, from the end.")
    parser.add_argument("--epochs", type=int, default=10, help="Epochs of each training.")
    parser.add_argument("--token_rate", type=float, default=0.4, help="Share of the visual prompts to prune.")
    parser.add_argument("--segment_rate", type=float, default=0.5, help="Share of the segments of the rest to prune.")
    parser.add_argument("--output_dir", default="pruned", help="Where the adapter is saved.")
    args = parser.parse_args(argv)
    logging.set_verbosity_error()  # of the new head, which the checkpoint does not have

    config = E2VPTConfig(num_visual_prompts=10, prompt_dropout=0.0, modules_to_save=["classifier"])
    model = get_peft_model(load_backbone(), config)
    data = load_images(model.config.image_size)
    training = TensorDataset(*data[: args.train_images])
    test = TensorDataset(*data[-args.test_images :])
    results: dict[str, float] = {}

    def report(step: str) -> None:
        results[step] = accuracy(model, test)
        print(f"{step:<26}{results[step]:.1%}")

    train(model, training, args.epochs)
    report("tuned")

    # What is each prompt worth? By how much the loss on the training images rises without it.
    scores = score_prompts(model, DataLoader(training, batch_size=100), progress_bar=False)
    print("visual prompts, the least missed first:", scores.tokens.argsort().tolist())

    # Without them: they are gone from the attention, the parameters and the file.
    print(prune_prompts(model, scores, token_rate=args.token_rate, segment_rate=args.segment_rate))
    report("pruned")

    # The others go back to where they started, the head as well, and learn again.
    rewind_prompts(model)
    report("rewound")
    train(model, training, args.epochs)
    report("pruned and tuned again")

    # The config of the adapter says what is pruned, so that it loads as any other.
    model.save_pretrained(args.output_dir)
    before, model = model, PeftModel.from_pretrained(load_backbone(), args.output_dir).eval()
    images = test.tensors[0]
    with torch.no_grad():
        torch.testing.assert_close(model(pixel_values=images).logits, before(pixel_values=images).logits)
    size = Path(args.output_dir, "adapter_model.safetensors").stat().st_size
    print(f"saved to {args.output_dir} ({size / 1024:.1f} kB), loaded again: the same logits")
    return results


if __name__ == "__main__":
    main()
