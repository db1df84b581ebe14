from __future__ import annotations

from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as pillow
from transformers import ViTImageProcessor

from ..support.models import tiny_vit
from .pages import ROOT

BACKBONE = "google/vit-base-patch16-224-in21k"
BEANS = "AI-Lab-Makerere/beans"
BEANS_FEATURES = Features(
    {"image": Image(), "labels": ClassLabel(names=["angular_leaf_spot", "bean_rust", "healthy"])}
)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to run in, with the examples, and what the pages load from the Hub.

    `from_pretrained` and `load_dataset` take a folder of that name for what they look for, so that no page has to be
    changed to run offline. The backbone is a random ViT with the layers of the real one, each of them narrow, and no
    head; the data set has three plain images in each split.
    """
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    vit = tiny_vit(image_size=224, patch_size=16, hidden_size=48, num_hidden_layers=12)
    vit.base_model.save_pretrained(tmp_path / BACKBONE)
    ViTImageProcessor().save_pretrained(tmp_path / BACKBONE)
    leaves = [pillow.new("RGB", (50, 40), (80 * number, 160, 0)) for number in range(3)]
    for split in ("train", "validation", "test"):
        data = Dataset.from_dict({"image": leaves, "labels": [0, 1, 2]}, features=BEANS_FEATURES)
        (tmp_path / BEANS / "data").mkdir(parents=True, exist_ok=True)
        data.to_parquet(tmp_path / BEANS / "data" / f"{split}-00000-of-00001.parquet")
    monkeypatch.chdir(tmp_path)
    return tmp_path
