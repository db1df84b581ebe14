"""The code in docs/hub.md, run against the local Hub in the order in which it is read."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from .client import HubClient
from .server import HubServer
from .test_model_card import readme

GUIDE = Path(__file__).parents[2] / "docs" / "hub.md"
BACKBONE = "google/vit-base-patch16-224-in21k"


def run_guide(folder: Path) -> int:
    """A tiny ViT takes the backbone's place."""
    from ..support.models import tiny_vit

    tiny_vit(image_size=224, patch_size=16, num_labels=5).push_to_hub(BACKBONE, token="hf_google")
    os.environ["HF_TOKEN"] = "hf_ann"
    before = Path.cwd()
    os.chdir(folder)
    try:
        namespace: dict[str, Any] = {}
        blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
        for block in blocks:
            exec(compile(block, str(GUIDE), "exec"), namespace)
        return len(blocks)
    finally:
        os.chdir(before)
        del os.environ["HF_TOKEN"]


def test_the_guide(hub: HubServer, client: HubClient, tmp_path: Path) -> None:
    assert client.run(run_guide, tmp_path) >= 4
    data: Any = ModelCard(readme(hub, "ann/flowers")).data
    assert data.license == "apache-2.0" and data.base_model == BACKBONE
    assert data.datasets == ["ann/flower-photos"]
    assert "e2vpt" in ModelCard(readme(hub, "ann/flowers", "experiment")).data.tags
