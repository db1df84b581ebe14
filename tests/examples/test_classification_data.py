"""From a data set to splits with columns `image` and `label`."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from classification_arguments import DataArguments
from classification_data import load_splits, split_off
from console import InputError
from datasets import ClassLabel, Dataset, Features, Image, Value, load_dataset

from tests.support.pictures import NAMES, pictures


def split(**values: Any) -> Any:
    return load_splits(DataArguments(**{name: str(v) if isinstance(v, Path) else v for name, v in values.items()}))


def pixels(data: Dataset) -> list[bytes]:
    return [np.asarray(image).tobytes() for image in data["image"]]


def test_validation_images_are_split_off(data: Path) -> None:
    first, again, other = (split(dataset=data, split_seed=seed) for seed in (0, 0, 1))
    assert {name: len(part) for name, part in first.items()} == {"train": 24, "validation": 6, "test": 12}
    assert not set(pixels(first["train"])) & set(pixels(first["validation"]))
    assert Counter(first["validation"]["label"][:]) == {0: 2, 1: 2, 2: 2}
    assert pixels(first["validation"]) == pixels(again["validation"])
    assert pixels(first["validation"]) != pixels(other["validation"])
    few = split(dataset=data, max_train_samples=10, max_eval_samples=5, validation_fraction=0.4)
    assert {name: len(part) for name, part in few.items()} == {"train": 6, "validation": 4, "test": 5}


def test_train_on_validation(data: Path) -> None:
    splits = split(dataset=data, train_on_validation=True)
    assert sorted(pixels(splits["train_and_validation"])) == sorted(pixels(load_dataset(str(data))["train"]))
    with pytest.raises(ValueError, match="there is no test split"):
        split(dataset=data / "train.parquet", train_on_validation=True)


@pytest.mark.parametrize(
    "layout", ["image folder", "image folder with splits", "parquet file", "splits of other names"]
)
def test_own_data(tmp_path: Path, layout: str) -> None:
    names: dict[str, Any] = {}
    source = tmp_path / "data"
    source.mkdir()
    images = pictures(30, seed=0)
    if layout.startswith("image folder"):
        for index, row in enumerate(images):
            part = ("validation" if index < 9 else "train") if "splits" in layout else ""
            folder = source / part / NAMES[row["label"]]
            folder.mkdir(parents=True, exist_ok=True)
            row["image"].save(folder / f"{index}.png")
        counts = {"train": 21, "validation": 9} if "splits" in layout else {"train": 24, "validation": 6}
    elif layout == "parquet file":
        source = source / "images.parquet"
        images.to_parquet(source)
        counts = {"train": 24, "validation": 6}
    else:
        # Bytes that are no declared images, labels as text.
        features = Features({"picture": Image(), "kind": Value("string")})
        rows = {"picture": images["image"][:], "kind": [NAMES[label] for label in images["label"]]}
        changed = Dataset.from_dict(rows, features=features)
        changed.to_parquet(source / "train.parquet")
        changed.select(range(9)).to_parquet(source / "test.parquet")
        names = {"validation_split": "test", "image_column": "picture", "label_column": "kind"}
        counts = {"train": 30, "validation": 9}
    splits = split(dataset=source, **names)
    assert {name: len(part) for name, part in splits.items()} == counts
    for part in splits.values():
        assert part.column_names == ["image", "label"]
        assert part.features["label"].names == NAMES
        for row in part:  # a picture's brightest channel is its class
            assert 2 - np.asarray(row["image"]).mean((0, 1)).argmax() == row["label"]


def test_numbers_as_labels(tmp_path: Path) -> None:
    """Numbers in their order, wherever they start; the same classes in all splits."""
    images = pictures(30, seed=0)
    labels = [(10, 9, 100)[label] for label in images["label"]]
    features = Features({"image": Image(), "label": Value("int64")})
    data = Dataset.from_dict({"image": images["image"][:], "label": labels}, features=features)
    data.to_parquet(tmp_path / "train.parquet")
    data.filter(lambda row: row["label"] == 100).to_parquet(tmp_path / "test.parquet")
    splits = split(dataset=tmp_path)
    assert splits["train"].features["label"].names == ["9", "10", "100"]
    assert set(splits["test"]["label"][:]) == {2}
    data.filter(lambda row: row["label"] != 9).to_parquet(tmp_path / "train.parquet")
    data.to_parquet(tmp_path / "test.parquet")
    with pytest.raises(ValueError, match="labels 9 are not among"):
        split(dataset=tmp_path)


def test_mistakes_about_data(data: Path) -> None:
    with pytest.raises(InputError, match="validation_split='dev' is not there: the splits are"):
        split(dataset=data, validation_split="dev")
    with pytest.raises(InputError, match="label_column='species' is not there: the columns are image, label"):
        split(dataset=data, label_column="species")
    for name, value in {"validation_fraction": 1.0, "min_crop_area": 0.0}.items():
        with pytest.raises(ValueError, match=f"{name}={value}"):
            DataArguments(**{name: value})


def test_one_class_in_a_table(tmp_path: Path) -> None:
    pictures(9, seed=0).filter(lambda row: row["label"] == 1).cast_column("label", Value("int64")).to_parquet(
        tmp_path / "train.parquet"
    )
    with pytest.raises(InputError, match="only one class, 1: two are needed"):
        split(dataset=tmp_path)


def labelled(labels: list[int]) -> Dataset:
    features = Features({"label": ClassLabel(num_classes=max(labels) + 1)})
    return Dataset.from_dict({"label": labels}, features=features)


@pytest.mark.parametrize("seed", range(4))
def test_rare_classes_are_in_both_parts(seed: int) -> None:
    """As far as they have two images: the only image of a class is there to train on."""
    train, validation = split_off(labelled([0] * 40 + [1] * 5 + [2] * 5 + [3]), 0.2, seed)
    assert len(train) + len(validation) == 51 and len(validation) == 10
    assert set(train["label"][:]) == {0, 1, 2, 3} and set(validation["label"][:]) == {0, 1, 2}
    train, validation = split_off(labelled(list(range(10)) * 2), 0.2, seed)
    assert len(validation) == 4 and set(train["label"][:]) == set(range(10))


def test_one_image_of_each_class_cannot_be_divided() -> None:
    with pytest.raises(InputError, match="one image of each class, so none can be split off"):
        split_off(labelled([0, 1, 2, 3]), 0.2, 0)


def test_what_is_odd_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for index, row in enumerate(pictures(24, seed=0)):
        part = "val" if index >= 20 or row["label"] == 2 else "train"
        folder = tmp_path / part / NAMES[row["label"]]
        folder.mkdir(parents=True, exist_ok=True)
        row["image"].save(folder / f"{index}.png")
    (tmp_path / "train" / "grey").mkdir()
    split(dataset=tmp_path)
    told = capsys.readouterr().err
    assert f"warning: no images in grey of {tmp_path / 'train'}: left out." in told
    assert "warning: no train image of red: it cannot be learned." in told
    assert "1 validation image" not in told
    split(dataset=tmp_path, max_eval_samples=1)
    told = capsys.readouterr().err
    assert "1 validation image: each is 100% of the accuracy" in told
    assert re.search("no validation image of [a-z]+, [a-z]+: the results say nothing about it", told)
