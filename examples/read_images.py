"""Data sets of labelled images from the Hub, folders and files, and what is said of those that cannot be used."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import PIL.Image
from console import InputError, warn
from datasets import Dataset, DatasetDict, Image, load_dataset
from tqdm.auto import tqdm

SPLITS = ("train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation")
"""Folders that `datasets` takes for splits."""
TABLES = (".parquet", ".csv", ".tsv", ".json", ".jsonl", ".arrow", ".zip", ".tar", ".gz")
"""Files by which `datasets` finds labels in other ways than by folders."""
FEW = 10
"""A validation part of fewer images says little."""


def read_dataset(name: str, configuration: str | None = None) -> DatasetDict:
    """Load a data set.

    Args:
        name (`str`): A Hub id, a folder of images (one subfolder per class), a parquet file or a folder of them.
        configuration (`str`, *optional*): That of a Hub data set.

    Raises:
        InputError: There is no such folder, or the images in it are not sorted into classes.
    """
    check_place("dataset", name)
    path = Path(name)
    if path.is_file():
        if path.suffix != ".parquet":
            raise InputError(
                f"dataset={name!r} is a file, but no parquet file. Give the folder of the images, with a subfolder "
                "for each class."
            )
        return load_dataset("parquet", data_files=name)
    if path.is_dir():
        check_folder(path)
    return load_dataset(name, configuration)


def check_place(option: str, name: str) -> None:
    """Refuse what can only be a path, but leads nowhere; `datasets` and transformers would look for it on the Hub.

    Raises:
        InputError: It leads nowhere.
    """
    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not Path(name).exists():
        raise InputError(f"{option}={name!r}: there is no such folder or file.")


def check_folder(folder: Path) -> None:
    """Refuse a folder whose images are not sorted into classes, and tell of classes without images.

    Raises:
        InputError: It has no images, images outside of the folders of classes, or a single class.
    """
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    if any(path.suffix.lower() in TABLES for path in files):
        return
    kinds = PIL.Image.registered_extensions()
    images = [path for path in files if path.suffix.lower() in kinds]
    if not images:
        raise InputError(f"dataset={str(folder)!r}: there are no images in this folder.")
    parts = [path for path in sorted(folder.iterdir()) if path.is_dir() and path.name.lower() in SPLITS] or [folder]
    for part in parts:
        loose = [image.name for image in images if image.parent == part]
        if loose:
            raise InputError(
                f"{enumerate_some(loose, 2)} in {part} belong to no class: put the images of each class into a "
                f"subfolder of its own, as in {part / 'cat' / loose[0]}."
            )
        filled = {parent for image in images for parent in image.parents}
        empty = [path.name for path in sorted(part.iterdir()) if path.is_dir() and path not in filled]
        if empty:
            warn(f"no images in {enumerate_some(empty)} of {part}: left out.")
    classes = {image.parent.name for image in images}
    if len(classes) == 1:
        raise InputError(
            f"dataset={str(folder)!r}: there is only one class, {classes.pop()}. Two are needed at least, each in a "
            "subfolder of its own."
        )


def check_images(splits: Mapping[str, Dataset]) -> None:
    """Decode every image once.

    Raises:
        InputError: Some cannot be read; it names them.
    """
    broken: list[str] = []
    total = sum(len(data) for data in splits.values())
    with tqdm(total=total, desc="Checking images", unit="image", delay=3, leave=False, disable=None) as bar:
        for name, data in splits.items():
            stored = data.cast_column("image", Image(decode=False)).select_columns("image")
            with ThreadPoolExecutor() as pool:
                for index, fault in enumerate(pool.map(find_fault, (row["image"] for row in stored))):
                    bar.update(1)
                    if fault is not None:
                        broken.append(f"{stored[index]['image']['path'] or f'{name} image {index}'} ({fault})")
    if broken:
        raise InputError(f"{len(broken)} of {total} images cannot be read: {enumerate_some(broken)}.")


def find_fault(stored: Mapping[str, Any]) -> str | None:
    """Why an image cannot be decoded."""
    try:
        with PIL.Image.open(stored["path"] if stored["bytes"] is None else io.BytesIO(stored["bytes"])) as image:
            image.load()
    except PIL.UnidentifiedImageError:
        return "not an image"
    except Exception as error:  # what PIL's many formats raise has no common class
        return str(error)
    return None


def warn_of_gaps(splits: Mapping[str, Dataset]) -> None:
    """Tell of classes that a split has no image of, and of a validation part that is too small to say much."""
    for split, data in splits.items():
        names, present = data.features["label"].names, Counter(data["label"][:])
        missing = [name for index, name in enumerate(names) if not present[index]]
        if missing:
            then = "it cannot be learned" if split == "train" else "the results say nothing about it"
            warn(f"no {split} image of {enumerate_some(missing)}: {then}.")
    if "validation" in splits and len(splits["validation"]) < FEW:
        count = len(splits["validation"])
        warn(
            f"{count} validation image{'s' * (count > 1)}: each is {1 / count:.0%} of the accuracy. More are needed "
            "to choose an epoch, or settings, by it."
        )


def enumerate_some(names: Iterable[str], most: int = 5) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
