"""The quickstart: the data and the backbone that it shares, its table, its check of the saved adapter, its claim."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from transformers import AutoModelForImageClassification, TrainerState

pytest.importorskip("sklearn")
ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"
data_and_backbone, progress, quickstart = (
    importlib.import_module(name) for name in ("data_and_backbone", "progress", "quickstart")
)

BRIEF = ["--epochs=1", "--train_per_class=2", "--max_test_images=48"]


def load_data(dataset: str | None = None, train_per_class: int = 50, seed: int = 0) -> tuple[Dataset, Dataset]:
    return data_and_backbone.load_data(dataset, train_per_class, max_test_images=2000, seed=seed)


@pytest.fixture(scope="module")
def pictures() -> Dataset:
    """24 colour pictures of three classes, labels without names."""
    arrays = np.random.default_rng(0).integers(0, 256, (24, 20, 16, 3), dtype=np.uint8)
    labels = [i % 3 for i in range(24)]
    features = Features({"image": Image(), "label": Value("int64")})
    return Dataset.from_dict({"image": [PILImage.fromarray(a) for a in arrays], "label": labels}, features=features)


def test_backbone_is_small_and_loads() -> None:
    files = list(Path(data_and_backbone.BACKBONE).iterdir())
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"} == {f.name for f in files}
    assert sum(file.stat().st_size for file in files) <= 3_000_000
    model, info = AutoModelForImageClassification.from_pretrained(
        data_and_backbone.BACKBONE, num_labels=10, output_loading_info=True
    )
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_few_labels_and_the_rest_to_test() -> None:
    train, test = load_data(train_per_class=7)
    labels = train["label"][:]
    assert [labels.count(digit) for digit in range(10)] == [7] * 10
    assert len(train) + len(test) == 1797
    assert train.features["label"].names == list("0123456789")
    pixels = [{np.asarray(image).tobytes() for image in data["image"]} for data in (train, test)]
    assert not pixels[0] & pixels[1], "a training image is also tested on"


def test_split_depends_on_the_seed_alone() -> None:
    first, again, other = (
        [np.asarray(image).tobytes() for image in load_data(seed=seed)[0]["image"]] for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_both_methods_start_with_the_same_head() -> None:
    label = load_data()[0].features["label"]
    first, again, other = (
        data_and_backbone.load_backbone(data_and_backbone.BACKBONE, label, seed).classifier.weight
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_main_prints_the_table_and_reloads(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    results = quickstart.main([*BRIEF, f"--output_dir={tmp_path}"])
    printed, notices = capfd.readouterr()
    assert len(printed.splitlines()) == 7, "a headline, the table, the last line, and two empty ones"
    assert notices == "", "nothing of libraries, and no bars where nobody watches"
    assert [result.method for result in results] == ["linear probe", "E²VPT"]
    probe, adapted = results
    assert probe.trainable == 10 * 128 + 10
    assert probe.trainable < adapted.trainable < 0.1 * adapted.total
    assert adapted.file_size == (tmp_path / "adapter_model.safetensors").stat().st_size
    assert all(0 <= result.accuracy <= 1 for result in results)
    assert "few labels: 20 training images (2 per class), 48 test images" in printed
    assert "predictions identical" in printed
    assert f"{adapted.trainable:,}" in printed

    again = quickstart.main([*BRIEF, f"--output_dir={tmp_path}"])
    assert again == results, "the same seed gives other results"


def test_a_different_prediction_after_reload_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result, logits = quickstart.Result("any", 0.5, 1, 10), np.ones((48, 10), dtype=np.float32)
    monkeypatch.setattr(quickstart, "linear_probe", lambda *_: result)
    monkeypatch.setattr(quickstart, "e2vpt", lambda *_: (result, logits))
    monkeypatch.setattr(quickstart, "reload", lambda *_: logits.copy())
    quickstart.main([*BRIEF, f"--output_dir={tmp_path}"])
    monkeypatch.setattr(quickstart, "reload", lambda *_: logits + 1e-3)
    with pytest.raises(SystemExit) as failure:
        quickstart.main([*BRIEF, f"--output_dir={tmp_path}"])
    assert "predicts differently (by up to 0.001)" in str(failure.value.code)


def test_one_bar_for_each_training(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bar, state = progress.OneBar("probe"), TrainerState(max_steps=3)
    bar.on_train_begin(None, state, None)
    for _ in range(3):
        bar.on_step_end(None, state, None)
    bar.on_train_end(None, state, None)
    assert "probe: 100%" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["parquet folder", "parquet splits", "parquet file", "image folder"])
def test_own_data(tmp_path: Path, pictures: Dataset, layout: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    source = folder
    if layout == "image folder":
        for index, row in enumerate(pictures):
            (folder / f"class{row['label']}").mkdir(exist_ok=True)
            row["image"].save(folder / f"class{row['label']}" / f"{index}.png")
    else:
        pictures.to_parquet(folder / "train.parquet")
        if layout == "parquet splits":
            pictures.select(range(9)).to_parquet(folder / "test.parquet")
        if layout == "parquet file":
            source = folder / "train.parquet"
    train, test = load_data(str(source), train_per_class=4)
    assert sorted(train["label"][:]) == [0] * 4 + [1] * 4 + [2] * 4
    assert len(test) == (9 if layout == "parquet splits" else 12)
    if layout == "image folder":
        results = quickstart.main([*BRIEF, f"--dataset={source}", f"--output_dir={tmp_path / 'out'}"])
        assert len(results) == 2


def test_no_image_left_to_test_on(tmp_path: Path, pictures: Dataset) -> None:
    pictures.to_parquet(tmp_path / "all.parquet")
    with pytest.raises(ValueError, match="train_per_class=8 leaves no image"):
        load_data(str(tmp_path / "all.parquet"), train_per_class=8)


def test_another_backbone_and_real_photographs(tmp_path: Path) -> None:
    model, data = SHARED / "checkpoints" / "vit-tiny-cifar10", SHARED / "data" / "flowers12"
    if not (model.exists() and data.exists()):
        pytest.skip(f"{SHARED} is not there")
    results = quickstart.main([*BRIEF, f"--model={model}", f"--dataset={data}", f"--output_dir={tmp_path}"])
    assert results[0].trainable == 12 * 192 + 12


def test_make_runs_it_as_it_is() -> None:
    recipe = (ROOT / "Makefile").read_text().partition("\nquickstart:")[2].splitlines()[1]
    assert recipe == "\t$(BIN)/python examples/quickstart.py"


@pytest.mark.slow
def test_e2vpt_beats_the_linear_probe(tmp_path: Path) -> None:
    """By points, not by chance, in what `make quickstart` runs; docs/quickstart.md has the gains of five seeds."""
    probe, adapted = quickstart.main([f"--output_dir={tmp_path}"])
    assert adapted.accuracy - probe.accuracy > 0.03
