from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageClassification, TrainingArguments, ViTImageProcessor

from ..support.models import tiny_vit
from .pages import ROOT

BACKBONE = "google/vit-base-patch16-224-in21k"


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to run in, with the examples, and a folder named like the backbone that the pages use.

    `from_pretrained` takes a folder of that name for what it looks for, so that no page has to be changed to run
    offline. It holds a random ViT with the layers of the real one, each of them narrow.
    """
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    vit = tiny_vit(image_size=224, patch_size=16, hidden_size=48, num_hidden_layers=12, num_labels=100)
    vit.save_pretrained(tmp_path / BACKBONE)
    ViTImageProcessor().save_pretrained(tmp_path / BACKBONE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def readers_names(checkout: Path) -> dict[str, Any]:
    """What the pages take for granted that a reader has: data, a metric, arguments, and the backbone once more."""
    images = torch.randn(4, 3, 224, 224)
    samples = [{"pixel_values": image, "labels": label} for label, image in enumerate(images)]
    return {
        "__name__": "page",
        "images": images[:3],
        "train": samples,
        "validation": samples,
        "accuracy": lambda prediction: {
            "accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())
        },
        "training_args": TrainingArguments(
            "out", num_train_epochs=1, save_strategy="no", report_to="none", disable_tqdm=True
        ),
        "backbone": AutoModelForImageClassification.from_pretrained(BACKBONE, num_labels=100),
    }
