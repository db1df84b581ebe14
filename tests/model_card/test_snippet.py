from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import get_peft_model
from transformers import ViTForImageClassification, ViTImageProcessor

from e2vpt_peft import E2VPTConfig

from ..support.models import tiny_vit
from .common import adapted, card, run_snippet


class TestCode:
    @pytest.mark.parametrize("names", [["ant", 'bee "b"', "cat"], None], ids=["named", "unnamed"])
    def test_it_runs(self, names: list[str] | None, tmp_path: Path) -> None:
        tiny_vit(num_labels=5).save_pretrained(tmp_path / "backbone")
        ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "backbone")
        labels: dict[str, Any] = {"num_labels": 3}
        if names is not None:
            labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
        backbone = ViTForImageClassification.from_pretrained(
            tmp_path / "backbone", ignore_mismatched_sizes=True, **labels
        )
        model = adapted(backbone)
        model.save_pretrained(tmp_path / "adapter")
        text = card(model, tmp_path / "adapter", base_model=str(tmp_path / "backbone"))
        assert run_snippet(text) in (names or ["LABEL_0", "LABEL_1", "LABEL_2"])

    def test_it_runs_for_an_adapter_in_a_subfolder(self, tmp_path: Path) -> None:
        tiny_vit().vit.save_pretrained(tmp_path / "backbone")
        backbone = type(tiny_vit().vit).from_pretrained(tmp_path / "backbone")
        config = E2VPTConfig(num_visual_prompts=2, num_segments=4)
        model = get_peft_model(backbone, config, adapter_name="flowers")
        model.save_pretrained(tmp_path / "adapter")
        text = card(model, tmp_path / "adapter", base_model=str(tmp_path / "backbone"))
        assert run_snippet(text) == "" and "ViTModel" in text

    def test_many_classes_are_not_listed(self, tmp_path: Path) -> None:
        names = {index: f"class {index}" for index in range(50)}
        text = card(adapted(tiny_vit(num_labels=50, id2label=names)), tmp_path)
        assert "num_labels=50" in text and "class 7" not in text
