"""Make the pictures of the documentation: real adapters, trained here on scikit-learn's handwritten digits.

    python docs/make_pictures.py

writes `docs/images/*.png`, in a few minutes on one core. What it trains is small: the backbone that comes with the
repository, 500 labelled images (200 in the search), 10 visual and 5 key-value prompts.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForImageClassification,
    TrainingArguments,
    set_seed,
)

from e2vpt_peft import (
    E2VPTConfig,
    E2VPTTrainer,
    PruningConfig,
    prune_prompts,
    score_prompts,
    score_prompts_by_layer,
)
from e2vpt_peft.plots import (
    plot_attention_on_image,
    plot_attention_to_prompts,
    plot_candidates,
    plot_features,
    plot_importance,
)

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
TRAINING_IMAGES = 500


def load_samples(size: int) -> list[dict[str, Any]]:
    """All 1,797 digits in a random order, as the backbone takes them."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(images, size=size, mode="bilinear").repeat(
        1, 3, 1, 1
    )
    order = torch.randperm(
        len(images), generator=torch.Generator().manual_seed(0)
    ).tolist()
    return [
        {"pixel_values": images[index], "labels": int(digits.target[index])}
        for index in order
    ]


def make_model() -> PeftModel:
    set_seed(0)
    backbone = ROOT / "examples" / "backbone"
    vit = AutoModelForImageClassification.from_pretrained(
        backbone, num_labels=10, ignore_mismatched_sizes=True
    )
    return get_peft_model(
        vit, E2VPTConfig(prompt_dropout=0.0, modules_to_save=["classifier"])
    )


def train(model: PeftModel, samples: list[dict[str, Any]], epochs: int) -> None:
    optimizer = torch.optim.AdamW(
        (p for p in model.parameters() if p.requires_grad), lr=1e-2
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    model.train()
    for _ in range(epochs):
        for batch in DataLoader(samples, batch_size=32, shuffle=True):  # type: ignore[arg-type]
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        schedule.step()


@torch.no_grad()
def class_token(model: PeftModel, images: torch.Tensor) -> torch.Tensor:
    """What the head sees."""
    return model(pixel_values=images, output_hidden_states=True).hidden_states[
        -1
    ][:, 0]


def accuracy(prediction: Any) -> dict[str, float]:
    return {
        "accuracy": float(
            (prediction.predictions.argmax(-1) == prediction.label_ids).mean()
        )
    }


def search(
    samples: list[dict[str, Any]], validation: list[dict[str, Any]], epochs: int
) -> dict[str, Any]:
    """The table of candidates that E2VPTTrainer writes."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = E2VPTTrainer(
            model=make_model(),
            args=TrainingArguments(
                folder,
                num_train_epochs=epochs,
                learning_rate=1e-2,
                lr_scheduler_type="cosine",
                per_device_train_batch_size=32,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
            ),
            train_dataset=samples,  # type: ignore[arg-type]
            eval_dataset=validation,  # type: ignore[arg-type]
            compute_metrics=accuracy,
            pruning_config=PruningConfig(
                token_rates=[0.2, 0.5, 0.8],
                segment_rates=[0.0, 0.3, 0.6],
                metric_for_best_model="accuracy",
            ),
        )
        metrics: Any = trainer.train().metrics
    rows = metrics["pruning_candidates"]
    best = next(
        row for row in rows if row["metric"] == metrics["pruning_metric"]
    )
    return {"metric": "eval_accuracy", "best": best["name"], "candidates": rows}


def main(argv: list[str] | None = None) -> None:
    """Train, and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--epochs",
        type=int,
        default=20,
        help="Epochs of the adapter that is looked at.",
    )
    parser.add_argument(
        "--search_epochs",
        type=int,
        default=8,
        help="Epochs of each candidate of the search.",
    )
    parser.add_argument(
        "--out", type=Path, default=IMAGES, help="The folder for the pictures."
    )
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)

    model = make_model()
    samples = load_samples(model.config.image_size)
    training, test = samples[:TRAINING_IMAGES], samples[TRAINING_IMAGES:]
    train(model, training, args.epochs)
    model.eval()

    images = torch.stack([sample["pixel_values"] for sample in test])
    labels = [sample["labels"] for sample in test]
    with torch.no_grad():
        right = (
            (
                model(pixel_values=images).logits.argmax(-1)
                == torch.tensor(labels)
            )
            .float()
            .mean()
            .item()
        )
    print(f"accuracy of the adapter on {len(test)} test images: {right:.1%}")
    with model.disable_adapter():
        frozen = class_token(model, images)
    features = {
        "frozen backbone": frozen,
        "with E²VPT": class_token(model, images),
    }
    chosen = slice(0, 500)  # more dots would hide each other
    features = {title: values[chosen] for title, values in features.items()}
    plot_features(features, labels[chosen]).savefig(
        args.out / "features_pca.png", dpi=110
    )
    plot_features(features, labels[chosen], method="tsne").savefig(
        args.out / "features_tsne.png", dpi=110
    )

    plot_attention_to_prompts(model, {"pixel_values": images[:64]}).savefig(
        args.out / "attention.png", dpi=110
    )
    plot_attention_on_image(
        model, {"pixel_values": images[:3]}, layer=3
    ).savefig(args.out / "attention_image.png", dpi=110)

    loader = DataLoader(training, batch_size=100)  # type: ignore[arg-type]
    by_layer = score_prompts_by_layer(model, loader, progress_bar=False)
    prune_prompts(
        model,
        score_prompts(model, loader, progress_bar=False),
        token_rate=0.3,
        segment_rate=0.5,
    )
    plot_importance(model, by_layer).savefig(
        args.out / "importance.png", dpi=110
    )

    results = search(training[:200], test[:500], args.search_epochs)
    plot_candidates(results).savefig(args.out / "candidates.png", dpi=110)


if __name__ == "__main__":
    main()
