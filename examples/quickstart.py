"""Adapt a pretrained vision transformer with E²VPT, and compare with a linear probe. No network, no GPU needed.

    python examples/quickstart.py                # real handwritten digits, 50 labelled images per class
    python examples/quickstart.py --model google/vit-base-patch16-224-in21k --dataset some/hub-dataset

By default a tiny ViT that comes with this repository (`examples/backbone`, pretrained on drawn symbols, pen strokes
and textures; it has never seen a letter or a digit) learns to read scikit-learn's `load_digits` from **few
labels**: 50 images per class to train on, the other 1,297 to test on. The linear probe trains the same new head, on
the same distorted images, for the same number of steps. Then the adapter is saved, loaded into a fresh backbone,
and has to predict the same. The images and the backbone come from `data_and_backbone.py`, beside this file.

`--dataset` takes a Hub id, a folder of images (one subfolder per class), a parquet file or a folder of them.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from console import hide_notices, run
from data_and_backbone import BACKBONE, HEAD, load_backbone, load_data, preprocess
from datasets import ClassLabel, Dataset
from peft import PeftModel, get_peft_model
from progress import show_one_bar
from transformers import AutoImageProcessor, HfArgumentParser, Trainer, TrainingArguments
from transformers.trainer_utils import EvalPrediction

from e2vpt_peft import E2VPTConfig, create_optimizer


@dataclass
class QuickstartArguments:
    """Options of the quickstart."""

    model: str = field(default=BACKBONE, metadata={"help": "Backbone: a Hub id or a folder."})
    dataset: str | None = field(
        default=None,
        metadata={"help": "Hub id, folder of images or parquet; default: scikit-learn's handwritten digits."},
    )
    train_per_class: int = field(default=50, metadata={"help": "Labelled images per class to train on."})
    max_test_images: int = field(default=2000, metadata={"help": "Test on at most so many images."})
    num_visual_prompts: int = field(default=0, metadata={"help": "Visual prompts in each layer."})
    num_kv_prompts: int = field(
        default=16, metadata={"help": "Key-value prompts in each layer, read beside the attention."}
    )
    epochs: int = field(default=30, metadata={"help": "Epochs, for both methods."})
    batch_size: int = field(default=32, metadata={"help": "Training batch size, for both methods."})
    learning_rate: float = field(
        default=3e-2, metadata={"help": "Peak learning rate of prompts and of the head beside them (AdamW)."}
    )
    probe_learning_rate: float = field(
        default=1e-1, metadata={"help": "Peak learning rate of the linear probe (AdamW)."}
    )
    augmentation: float = field(
        default=0.08, metadata={"help": "Strength of random affine distortions in training, for both methods."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the labelled images, the initial values and the order."})
    output_dir: str = field(default="quickstart-output", metadata={"help": "Where the adapter is saved."})


@dataclass
class Result:
    """One line of the table."""

    method: str
    accuracy: float
    trainable: int
    total: int
    file_size: int | None = None


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy."""
    return {"accuracy": float((np.asarray(prediction.predictions).argmax(1) == prediction.label_ids).mean())}


def make_trainer(
    title: str,
    model: torch.nn.Module,
    args: QuickstartArguments,
    train: Dataset,
    test: Dataset,
    optimizer: torch.optim.Optimizer | None = None,
) -> Trainer:
    """A plain Trainer, the same for both methods but for the learning rate."""
    training_args = TrainingArguments(
        output_dir=args.output_dir,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=128,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        remove_unused_columns=False,  # or it would drop the images before they are preprocessed
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        seed=args.seed,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=train,
        eval_dataset=test,
        compute_metrics=compute_metrics,
        optimizers=(optimizer, None),
    )
    show_one_bar(trainer, title)
    return trainer


def linear_probe(args: QuickstartArguments, label: ClassLabel, train: Dataset, test: Dataset) -> Result:
    """Train the head alone."""
    model = load_backbone(args.model, label, args.seed)
    model.requires_grad_(False)
    model.get_submodule(HEAD).requires_grad_(True)
    optimizer = create_optimizer(model, lr=args.probe_learning_rate, weight_decay=1e-4)
    trainer = make_trainer("linear probe", model, args, train, test, optimizer)
    trainer.train()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    return Result("linear probe", trainer.evaluate()["eval_accuracy"], trainable, total)


def e2vpt(args: QuickstartArguments, label: ClassLabel, train: Dataset, test: Dataset) -> tuple[Result, np.ndarray]:
    """Train prompts and the head, and save them. Returns also the logits of the test images."""
    config = E2VPTConfig(
        num_visual_prompts=args.num_visual_prompts,
        num_kv_prompts=args.num_kv_prompts,
        share_kv_prompts=False,
        kv_prompt_activation="gelu",
        prompt_dropout=0.0,  # random distortions of the images do that job here
        modules_to_save=[HEAD],
    )
    model = get_peft_model(load_backbone(args.model, label, args.seed), config)
    optimizer = create_optimizer(model, lr=args.learning_rate, weight_decay=1e-4)
    trainer = make_trainer("E²VPT       ", model, args, train, test, optimizer)
    trainer.train()
    logits, _, metrics = trainer.predict(test)
    model.save_pretrained(args.output_dir)
    trainable, total = model.get_nb_trainable_parameters()
    file_size = Path(args.output_dir, "adapter_model.safetensors").stat().st_size
    accuracy = metrics["test_accuracy"] if metrics else float("nan")
    return Result("E²VPT", accuracy, trainable, total, file_size), np.asarray(logits)


def reload(args: QuickstartArguments, label: ClassLabel, train: Dataset, test: Dataset) -> np.ndarray:
    """Load the saved adapter into a fresh backbone; the logits of the test images."""
    model = PeftModel.from_pretrained(load_backbone(args.model, label, args.seed + 1), args.output_dir)
    return np.asarray(make_trainer("reloaded", model, args, train, test).predict(test).predictions)


def print_table(results: list[Result]) -> None:
    """Accuracy and cost of each method."""
    print(f"\n{'method':<14}{'accuracy':>10}{'trainable':>12}{'share':>9}{'adapter file':>15}")
    for result in results:
        size = "-" if result.file_size is None else f"{result.file_size / 1024:.1f} kB"
        share = result.trainable / result.total
        print(f"{result.method:<14}{result.accuracy:>10.1%}{result.trainable:>12,}{share:>9.2%}{size:>15}")


def main(argv: list[str] | None = None) -> list[Result]:
    """Run the quickstart; returns the lines of the table."""
    hide_notices()
    (args,) = HfArgumentParser(QuickstartArguments).parse_args_into_dataclasses(argv)  # type: ignore[arg-type]
    train, test = load_data(args.dataset, args.train_per_class, args.max_test_images, args.seed)
    label: ClassLabel = train.features["label"]
    processor = AutoImageProcessor.from_pretrained(args.model)
    train = train.with_transform(partial(preprocess, processor, augmentation=args.augmentation))
    test = test.with_transform(partial(preprocess, processor))
    print(
        f"{args.dataset or 'handwritten digits (scikit-learn)'}: {label.num_classes} classes, few labels: "
        f"{len(train)} training images ({args.train_per_class} per class), {len(test)} test images"
    )
    probe = linear_probe(args, label, train, test)
    adapted, logits = e2vpt(args, label, train, test)
    reloaded = reload(args, label, train, test)
    print_table([probe, adapted])
    if not np.array_equal(logits, reloaded):
        sys.exit(f"The reloaded adapter predicts differently (by up to {np.abs(logits - reloaded).max():.2g}).")
    print(f"\nAdapter saved to {args.output_dir}, loaded into a fresh backbone: predictions identical.")
    return [probe, adapted]


if __name__ == "__main__":
    run(main)
