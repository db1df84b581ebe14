"""Reading a task: every image is decoded and resized once, into one tensor of bytes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Image, load_dataset
from PIL import Image as PILImage

from examples.data_and_backbone import load_digits

from .drawing import draw_task
from .tasks import Task

TRAIN_IMAGES, VALIDATION_IMAGES, TEST_IMAGES = 800, 200, 1000
"""Of the tasks of `mini`, the first so many. Where there are fewer, a fifth of the training images validate."""


@dataclass(frozen=True)
class Images:
    """Images (number, 3, height, width) as bytes, and their labels."""

    pixels: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Images:
        return Images(self.pixels.to(device), self.labels.to(device))

    def __getitem__(self, part: slice) -> Images:
        return Images(self.pixels[part], self.labels[part])


@dataclass(frozen=True)
class Splits:
    """To search: `train` and `validation`. For the result: `both` to train on, and `test`, which is used once."""

    train: Images
    validation: Images
    both: Images
    test: Images
    classes: int

    def to(self, device: torch.device) -> Splits:
        return Splits(*(s.to(device) for s in (self.train, self.validation, self.both, self.test)), self.classes)


def load(task: Task, data_dir: str | None, size: int) -> Splits:
    """All images of a task.

    Args:
        task ([`Task`]): The task.
        data_dir (`str`, *optional*): The folder with the folders of all tasks.
        size (`int`): Height and width of the backbone's input.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: There are more classes than the task should have.
    """
    folder = Path(data_dir or "") / task.folder
    margin = size * 8 // 7 if task.crop else size
    if task.layout == "vtab":
        train, validation, both, test = (
            read_list(folder, f"{name}.txt", margin) for name in ("train800", "val200", "train800val200", "test")
        )
    elif task.layout == "fgvc":
        train, validation, test = read_fgvc(folder, margin)
        both = join(train, validation)
    else:
        if task.layout == "drawn":
            both, test = (
                decode(*draw_task(task.name, number, seed), size)  # type: ignore[arg-type]
                for seed, number in enumerate((TRAIN_IMAGES + VALIDATION_IMAGES, TEST_IMAGES))
            )
        elif task.layout == "digits":
            both, test = read_digits(size)
        else:
            both, test = read_dataset(folder, size, shuffled=task.layout == "shuffled")
        both, test = both[: TRAIN_IMAGES + VALIDATION_IMAGES], test[:TEST_IMAGES]
        middle = len(both) * TRAIN_IMAGES // (TRAIN_IMAGES + VALIDATION_IMAGES)
        train, validation = both[:middle], both[middle:]
    found = 1 + int(torch.cat([split.labels for split in (both, test)]).max())
    if task.classes is not None and found > task.classes:
        raise ValueError(f"{task.name} has {task.classes} classes, but {folder} has a label {found - 1}.")
    return Splits(train, validation, both, test, task.classes or found)


def decode(pictures: Iterable[Any], labels: Iterable[int], size: int, crop: bool = False) -> Images:
    """Bring pictures (PIL images, arrays or paths) to colour and to one size: squeezed, or the middle of them."""
    arrays = []
    for picture in pictures:
        if isinstance(picture, Path):
            with PILImage.open(picture) as file:
                image = file.convert("RGB")
        else:
            image = (PILImage.fromarray(picture) if isinstance(picture, np.ndarray) else picture).convert("RGB")
        box = None
        if crop:
            side = min(image.size)
            left, top = ((length - side) / 2 for length in image.size)
            box = (left, top, left + side, top + side)
        arrays.append(np.asarray(image.resize((size, size), PILImage.Resampling.BILINEAR, box)))
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
    return Images(pixels, torch.tensor(list(labels), dtype=torch.long))


def join(*parts: Images) -> Images:
    return Images(torch.cat([part.pixels for part in parts]), torch.cat([part.labels for part in parts]))


def read_list(folder: Path, name: str, size: int) -> Images:
    """VTAB-1k as the community has it: a text file of lines `path label`, paths from the task's folder."""
    lines = [line.rsplit(maxsplit=1) for line in (folder / name).read_text(encoding="utf-8").splitlines() if line]
    return decode((folder / path for path, _ in lines), (int(label) for _, label in lines), size)


def read_fgvc(folder: Path, size: int) -> list[Images]:
    """FGVC as VPT has it: `train.json`, `val.json`, `test.json`, each from the image's name to its class.

    The images lie in the folder itself, in `images` or in `Images`. Classes are numbered in their order.
    """
    files = [json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in ("train", "val", "test")]
    order = {label: index for index, label in enumerate(sorted({label for file in files for label in file.values()}))}
    first = next(iter(files[0]))
    places = [folder, folder / "images", folder / "Images"]
    place = next((path for path in places if (path / first).is_file()), None)
    if place is None:
        raise FileNotFoundError(f"{first} of {folder / 'train.json'} is in none of {', '.join(map(str, places))}.")
    return [
        decode((place / name for name in file), (order[label] for label in file.values()), size, crop=True)
        for file in files
    ]


def read_digits(size: int) -> tuple[Images, Images]:
    """scikit-learn's handwritten digits in random order: 1,000 to train and validate on, 797 to test on."""
    data = load_digits()["train"].shuffle(seed=0)
    everything = decode(data["image"], data["label"], size)
    middle = TRAIN_IMAGES + VALIDATION_IMAGES
    return everything[:middle], everything[middle:]


def read_dataset(folder: Path, size: int, shuffled: bool = False) -> tuple[Images, Images]:
    """Parquet or image folders, split into `train` and `test`; only as many images as are needed are decoded.

    Files may be sorted by class, so that what is trained on is drawn at random, unless it has been `shuffled` before.
    So is what is tested on, where there is more than is needed.
    """
    splits = load_dataset(str(folder))
    if not {"train", "test"} <= set(splits):
        raise FileNotFoundError(f"{folder} needs a split 'train' and a split 'test', but has {', '.join(splits)}.")
    parts = []
    for name, number in (("train", TRAIN_IMAGES + VALIDATION_IMAGES), ("test", TEST_IMAGES)):
        data = splits[name].cast_column("image", Image(mode="RGB"))
        as_it_is = shuffled if name == "train" else len(data) <= number
        if not as_it_is:
            data = data.shuffle(seed=0)
        data = data.select(range(min(number, len(data))))
        parts.append(decode(data["image"], data["label"], size))
    return parts[0], parts[1]
