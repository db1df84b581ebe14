from __future__ import annotations

import io
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageClassification, ViTForImageClassification, ViTImageProcessor

from e2vpt_peft import E2VPTConfig, prune_prompts, write_model_card

from ..support.models import tiny_vit

PERSONS = b"---\r\nlicense: mit   # as agreed\r\ntags: [mine]\r\n---\r\n\r\n# Flowers\r\n\r\nTrained by hand.\r\n"


def adapted(backbone: Any = None, **config: Any) -> PeftModel:
    settings = {"num_visual_prompts": 4, "num_kv_prompts": 2, "num_segments": 4, "modules_to_save": ["classifier"]}
    return get_peft_model(backbone or tiny_vit(), E2VPTConfig(**{**settings, **config}))  # type: ignore


def card(model: Any, folder: Path, **details: Any) -> str:
    write_model_card(model, folder, **details)
    return (folder / "README.md").read_text()


def metadata(text: str) -> Any:
    """As huggingface_hub reads it, which refuses a model-index that the Hub cannot show."""
    return ModelCard(text).data


def run_snippet(text: str) -> str:
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    assert code.startswith("import e2vpt_peft")
    with redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "README.md", "exec"), {})
    return printed.getvalue().strip()


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
            assert data.eval_results[0].dataset_name == "flowers"
            model.save_pretrained(tmp_path / "adapter")  # PEFT writes the path of the backbone into the card

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

    def test_mistakes(self, tmp_path: Path) -> None:
        folder = tmp_path / "adapter"
        with pytest.raises(ValueError, match="adapter_name='other' is no E2VPT adapter of this model"):
            write_model_card(adapted(), folder, adapter_name="other")
        with pytest.raises(ValueError, match="adapter_name is needed: the active E2VPT adapters are"):
            write_model_card(get_peft_model(tiny_vit(), LoraConfig(target_modules=["q_proj"])), folder)
        with pytest.raises(TypeError, match="datasett"):
            write_model_card(adapted(), folder, datasett="cifar100")
        assert not folder.exists()


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
        assert run_snippet(card(model, tmp_path / "adapter")) in (names or ["LABEL_0", "LABEL_1", "LABEL_2"])

    def test_it_runs_for_an_adapter_in_a_subfolder(self, tmp_path: Path) -> None:
        tiny_vit().vit.save_pretrained(tmp_path / "backbone")
        backbone = type(tiny_vit().vit).from_pretrained(tmp_path / "backbone")
        config = E2VPTConfig(num_visual_prompts=2, num_segments=4)
        model = get_peft_model(backbone, config, adapter_name="flowers")
        model.save_pretrained(tmp_path / "adapter")
        text = card(model, tmp_path / "adapter")
        assert run_snippet(text) == "" and "ViTModel" in text

    def test_many_classes_are_not_listed(self, tmp_path: Path) -> None:
        names = {index: f"class {index}" for index in range(50)}
        text = card(adapted(tiny_vit(num_labels=50, id2label=names)), tmp_path)
        assert "num_labels=50" in text and "class 7" not in text

    def test_the_image_processor_beside_the_adapter_is_used(self, tmp_path: Path) -> None:
        ViTImageProcessor().save_pretrained(tmp_path)
        assert f'AutoImageProcessor.from_pretrained("{tmp_path}")' in card(adapted(), tmp_path)


class TestCardsThatPersonsWrote:
    def test_they_stay_to_the_byte(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        path = tmp_path / "README.md"
        for content in (PERSONS, b"Hello", b"---\n[not: metadata\n---\nHello"):
            path.write_bytes(content)
            caplog.clear()
            write_model_card(adapted(), tmp_path)
            assert path.read_bytes() == content
            assert "was written by a person: it stays as it is" in caplog.text

    def test_a_generated_part_that_somebody_changed_stays(self, tmp_path: Path) -> None:
        text = card(adapted(), tmp_path).replace("## Prompts", "## Prompts, which are few")
        (tmp_path / "README.md").write_text(text)
        assert card(adapted(num_visual_prompts=3), tmp_path) == text

    def test_what_stands_outside_the_generated_part_is_kept(self, tmp_path: Path) -> None:
        begin, end = "<!-- e2vpt_peft writes", "<!-- e2vpt_peft: end -->"
        text = card(adapted(), tmp_path, name="flowers").replace(begin, f"Mine, above.\n{begin}")
        text = text.replace(end, f"{end}\n\nMine, below.")
        for content in (text, text.replace("\n", "\r\n")):
            (tmp_path / "README.md").write_bytes(content.encode())
            new = card(adapted(num_visual_prompts=3), tmp_path, name="flowers")
            assert new == text.replace(generated(text), generated(new)) and "Mine, above.\n" in new
            assert new.endswith(f"{end}\n\nMine, below.\n") and "| visual prompts | 3 per" in new

    def test_metadata_that_somebody_changed_is_kept(self, tmp_path: Path) -> None:
        options: dict[str, Any] = {"name": "flowers", "dataset": "me/flowers", "base_model": "google/vit-base"}
        text = card(adapted(), tmp_path, metrics={"test_accuracy": 0.5}, **options)
        text = text.replace("google/vit-base\n", "google/vit-large\nlicense: mit\n", 1).replace(
            "- e2vpt\n", "- mine\n"
        )
        other = "model-index:\n- name: flowers\n  results:\n"
        assert other in text
        by_hand = "  - task: {type: image-classification}\n    dataset: {name: Trees, type: me/trees}\n"
        by_hand += "    metrics: [{type: accuracy, value: 0.25}]\n"
        (tmp_path / "README.md").write_text(text.replace(other, other + by_hand))
        data = metadata(card(adapted(), tmp_path, metrics={"test_accuracy": 0.75}, **options))
        assert data.base_model == "google/vit-large" and data.license == "mit" and {"mine", "e2vpt"} <= set(data.tags)
        results = [(one.dataset_type, one.metric_value) for one in data.eval_results]
        assert sorted(results) == [("me/flowers", 0.75), ("me/trees", 0.25)]

    def test_metadata_that_nobody_changed_is_written_anew(self, tmp_path: Path) -> None:
        card(adapted(), tmp_path, dataset="me/flowers", metrics={"accuracy": 0.5})
        data = metadata(card(adapted(), tmp_path, dataset="me/trees"))
        assert data.datasets == ["me/trees"] and data.eval_results is None


class TestCardsThatNobodyWrote:
    def test_the_form_that_peft_saves_is_replaced(self, tmp_path: Path) -> None:
        model = adapted()
        model.save_pretrained(tmp_path)
        assert "[More Information Needed]" in (tmp_path / "README.md").read_text()
        assert card(model, tmp_path).count("\n# ") == 1

    def test_a_form_with_something_filled_in_stays(self, tmp_path: Path) -> None:
        model = adapted()
        model.save_pretrained(tmp_path)
        filled = (tmp_path / "README.md").read_text().replace("[More Information Needed]", "Ann", 1)
        (tmp_path / "README.md").write_text(filled)
        assert card(model, tmp_path) == filled

    def test_saving_and_writing_again_changes_nothing(self, tmp_path: Path) -> None:
        model = adapted()
        text = card(model, tmp_path, base_model="google/vit-base", dataset="me/flowers", metrics={"accuracy": 0.5})
        model.save_pretrained(tmp_path)
        again = card(model, tmp_path, base_model="google/vit-base", dataset="me/flowers", metrics={"accuracy": 0.5})
        assert again == text

    def test_another_version_of_peft_does_not_make_it_a_persons(self, tmp_path: Path) -> None:
        text = card(adapted(), tmp_path)
        (tmp_path / "README.md").write_text(re.sub(r"- PEFT .*", "- PEFT 0.1.0\n- PEFT 0.2.0", text))
        assert card(adapted(), tmp_path) == text


def generated(text: str) -> str:
    return re.findall(r"<!-- e2vpt_peft writes.*<!-- e2vpt_peft: end -->", text, re.DOTALL)[0]
