from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForImageClassification

from e2vpt_peft import E2VPTConfig, prune_prompts

from ..support.models import BESIDE, tiny_vit
from .common import adapted, card, metadata


class TestWhatACardSays:
    def test_everything_is_filled_in(self, tmp_path: Path) -> None:
        model = adapted()
        model.save_pretrained(tmp_path)
        text = card(
            model,
            tmp_path,
            base_model="google/vit-base-patch16-224",
            dataset="uoft-cs/cifar100",
            dataset_config="cifar100",
            metrics={"eval_loss": 0.5, "eval_runtime": 3.2, "epoch": 2.0, "test_accuracy": 0.875},
            arguments={"learning_rate": 0.01},
            license="mit",
            tags=["mine"],
            name="flowers",
        )
        assert "More Information Needed" not in text
        data = metadata(text)
        assert (data.base_model, data.library_name) == ("google/vit-base-patch16-224", "peft")
        assert (data.pipeline_tag, data.license) == ("image-classification", "mit")
        assert data.datasets == ["uoft-cs/cifar100"]
        assert data.tags == [
            "base_model:adapter:google/vit-base-patch16-224",
            "e2vpt",
            "image-classification",
            "mine",
            "transformers",
        ]
        assert data.model_name == "flowers"
        results = [(one.metric_type, one.metric_value, one.dataset_split) for one in data.eval_results]
        assert results == [("loss", 0.5, "validation"), ("accuracy", 0.875, "test")]
        assert {one.dataset_type for one in data.eval_results} == {"uoft-cs/cifar100"}
        assert {one.task_type for one in data.eval_results} == {"image-classification"}
        for line in ("# flowers", "| accuracy | test | 0.875 |", "- learning_rate: 0.01", "| adapted layers | 3 |"):
            assert f"\n{line}\n" in text
        assert "runtime" not in text and "epoch" not in text

    def test_sizes_are_those_that_peft_prints(self, tmp_path: Path) -> None:
        model = adapted()
        text = card(model, tmp_path)
        trainable, total = model.get_nb_trainable_parameters()
        assert f"| trainable parameters | {trainable:,} ({trainable / total:.2%} of {total:,}) |" in text
        assert "| visual prompts | 4 per layer (deep) |" in text and "## Pruning" not in text
        model.eval().requires_grad_(False)
        assert card(model, tmp_path) == text, "an adapter that was loaded for inference has the same card"

    def test_what_pruning_left(self, tmp_path: Path) -> None:
        model = adapted()
        kept = [True, True, False, True]
        summary = prune_prompts(model, token_mask=kept, segment_mask=[kept] * 4)
        text = card(model, tmp_path, pruning="By hand.")
        for name in ("tokens", "segments", "parameters"):
            before, after = getattr(summary, f"{name}_before"), getattr(summary, f"{name}_after")
            assert re.search(rf"\| [a-z ]+ \| {before} \| {after} \|\n", text), name
        assert "| visual prompts | 3 of 4 per layer (deep) |" in text
        assert "\nBy hand.\n" in text

    @pytest.mark.parametrize(
        ("config", "lines"),
        [
            ({"visual_prompt_depth": "shallow"}, ["| visual prompts | 4 before the first layer (shallow) |"]),
            ({"num_visual_prompts": 0}, ["trained are key-value prompts and `classifier`."]),
            ({"num_kv_prompts": 0, "modules_to_save": None}, ["trained are visual prompts."]),
            (
                BESIDE,
                ["2 per head and layer, keys and values apart, read by GELU beside the attention |"],
            ),
            ({"share_kv_prompts": False}, ["| key-value prompts | 2 per head and layer, keys and values apart |"]),
        ],
        ids=str,
    )
    def test_kinds_of_prompts(self, config: dict[str, Any], lines: list[str], tmp_path: Path) -> None:
        text = card(adapted(**config), tmp_path)
        assert all(line in text for line in lines)
        prompts = sum(p.numel() for name, p in adapted(**config).named_parameters() if "e2vpt_" in name)
        assert f"| of these, prompts | {prompts:,} |" in text

    def test_names_of_files_are_no_ids(self, tmp_path: Path) -> None:
        """The Hub refuses metadata with them, and they are nobody's business."""
        (tmp_path / "flowers").mkdir()
        tiny_vit().save_pretrained(tmp_path / "backbone")
        model = adapted(AutoModelForImageClassification.from_pretrained(tmp_path / "backbone"))
        model.save_pretrained(tmp_path / "adapter")
        options: dict[str, Any] = {"dataset": str(tmp_path / "flowers"), "metrics": {"accuracy": 0.5}}
        for _ in range(2):
            text = card(model, tmp_path / "adapter", **options)
            data = metadata(text)
            assert data.base_model is None and data.datasets is None
            assert not any(str(tmp_path) in tag for tag in data.tags)
            assert data.eval_results is None  # which the Hub would show as those on somebody else's `flowers`
            assert "adapter for `backbone`, trained on `flowers`." in text and "datasets/" not in text
            assert str(tmp_path / "backbone") not in text and '"path/to/the/backbone"' in text
            model.save_pretrained(tmp_path / "adapter")  # PEFT writes the path of the backbone into the card

    @pytest.mark.parametrize(
        "base_model",
        [
            "x`\n\n# Heading\n<img src='http://127.0.0.1/track.png'>\n```python\nimport os\n```\n<!--",
            "a <!-- e2vpt_peft: end --> b",
            "a" * 5000,
            "a\0b",
            "\ud800",
            "/home/ann/backbone",
            "../backbone",
        ],
        ids=ascii,
    )
    def test_what_a_stranger_wrote_in_place_of_an_id_is_not_in_it(self, base_model: str, tmp_path: Path) -> None:
        model = adapted()
        model.peft_config["default"].base_model_name_or_path = base_model
        texts = [card(model, tmp_path, metrics={"accuracy": value}) for value in (0.5, 0.25)]
        assert "0.5" in texts[0] and "0.25" in texts[1]  # renewed
        for text in texts:
            assert "adapter for a vision transformer." in text
            assert base_model not in text and "Heading" not in text and "<img" not in text

    def test_results_without_a_data_set_are_in_the_text_alone(self, tmp_path: Path) -> None:
        text = card(adapted(), tmp_path, metrics={"accuracy": 0.5})
        assert metadata(text).eval_results is None and "| accuracy |  | 0.5 |" in text

    def test_the_adapter_of_that_name(self, tmp_path: Path) -> None:
        model = adapted()
        model.add_adapter("other", E2VPTConfig(num_visual_prompts=1, num_kv_prompts=0))
        assert "| visual prompts | 4 per" in card(model, tmp_path)
        text = card(model, tmp_path, adapter_name="other")
        assert "| visual prompts | 1 per" in text and 'subfolder="other"' in text

    def test_adapters_of_transformers_itself(self, tmp_path: Path) -> None:
        backbone = tiny_vit()
        backbone.add_adapter(E2VPTConfig(num_visual_prompts=4, num_kv_prompts=0))
        assert "| of these, prompts | 384 |" in card(backbone, tmp_path)
