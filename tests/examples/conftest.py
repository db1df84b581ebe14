from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from tests.support.pictures import pictures

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def load_script() -> Callable[[str], Any]:
    """From the name of an example to an object with its functions; the example does not run."""
    return lambda name: SimpleNamespace(**runpy.run_path(str(EXAMPLES / name), run_name=Path(name).stem))


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a random ViT for 16 x 16 pixels, two layers of 32, and its image processor."""
    folder = tmp_path_factory.mktemp("backbone")
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=16, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    ViTForImageClassification(config).save_pretrained(folder)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 16, "width": 16},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return str(folder)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of parquet: 30 images to train on, 12 to test."""
    folder = tmp_path_factory.mktemp("data")
    pictures(30, seed=0).to_parquet(folder / "train.parquet")
    pictures(12, seed=1).to_parquet(folder / "test.parquet")
    return folder
