"""The images of `image_classification.py`: its splits, columns and classes."""

from __future__ import annotations

from collections import Counter

import numpy as np
from classification_arguments import DataArguments
from console import InputError
from data_and_backbone import load_digits
from datasets import ClassLabel, Dataset, DatasetDict, Image, concatenate_datasets
from read_images import check_images, read_dataset, warn_of_gaps

TOGETHER = "train_and_validation"
"""The split with the training and the validation images."""


def load_splits(args: DataArguments) -> DatasetDict:
    """A training, a validation and, if there is one, a test split, with columns `image` and `label`.

    With `train_on_validation` there is also one of the training and validation images together. A missing validation
    split is cut off the training split; which images go where depends on `split_seed` alone.

    Raises:
        InputError:
            A split or a column is not there, the images are not sorted into two classes or more, some cannot be read,
            or `train_on_validation` leaves nothing to evaluate on.
    """
    if args.dataset is None:
        found = load_digits()["train"].train_test_split(test_size=0.5, seed=0, stratify_by_column="label")
    else:
        found = read_dataset(args.dataset, args.dataset_config)
    for option in ("train_split", "validation_split", "test_split"):
        if getattr(args, option) not in (None, *found):
            raise InputError(f"{option}={getattr(args, option)!r} is not there: the splits are {', '.join(found)}.")
    validation_name = args.validation_split or next(
        (n for n in ("validation", "valid", "val", "dev") if n in found), None
    )
    test_name = args.test_split or ("test" if "test" in found and validation_name != "test" else None)

    train = found[args.train_split]
    image = args.image_column or find_column(train, (Image,), ("image", "img", "pixel_values"))
    label = args.label_column or find_column(train, (ClassLabel,), ("label", "labels", "fine_label", "class"))
    train = tidy(train, image, label, None)
    names = train.features["label"].names
    if len(names) < 2:
        raise InputError(f"There is only one class, {', '.join(names)}: two are needed at least.")
    others = {
        name: sample(tidy(found[split], image, label, names), args.max_eval_samples, args.split_seed)
        for name, split in (("validation", validation_name), ("test", test_name))
        if split is not None
    }
    train = sample(train, args.max_train_samples, args.split_seed)
    if "validation" not in others:
        train, validation = split_off(train, args.validation_fraction, args.split_seed)
        others["validation"] = sample(validation, args.max_eval_samples, args.split_seed)
    if args.train_on_validation and "test" not in others:
        raise InputError("train_on_validation leaves nothing to evaluate on: there is no test split.")
    warn_of_gaps({"train": train, **others})
    if args.check_images and args.dataset is not None:
        check_images({"train": train, **others})
    if args.train_on_validation:
        others[TOGETHER] = concatenate_datasets([train, others["validation"]])
    return DatasetDict(train=train, **others)


def find_column(data: Dataset, kinds: tuple[type, ...], usual_names: tuple[str, ...]) -> str:
    """The column with one of the usual names, or else the only one of that kind."""
    for name in usual_names:
        if name in data.features:
            return name
    found = [name for name, feature in data.features.items() if isinstance(feature, kinds)]
    if len(found) != 1:
        raise InputError(
            f"None of the columns {', '.join(data.features)} is clearly the {usual_names[0]}: set "
            f"{usual_names[0]}_column."
        )
    return found[0]


def tidy(data: Dataset, image: str, label: str, names: list[str] | None) -> Dataset:
    """Columns `image` and `label`, labels as classes: those of `names`, or those that the data has."""
    for option, column in (("image_column", image), ("label_column", label)):
        if column not in data.features:
            raise InputError(f"{option}={column!r} is not there: the columns are {', '.join(data.features)}.")
    data = data.select_columns([image, label]).rename_columns({image: "image", label: "label"})
    if not isinstance(data.features["image"], Image):
        data = data.cast_column("image", Image())
    if isinstance(data.features["label"], ClassLabel):
        return data
    values = data["label"][:]
    names = names or [str(value) for value in sorted(set(values))]
    index = {name: position for position, name in enumerate(names)}
    if unknown := sorted({str(value) for value in values} - set(index)):
        raise InputError(
            f"The labels {', '.join(unknown[:5])} are not among those to train on: {', '.join(names[:10])}."
        )
    labels = [index[str(value)] for value in values]
    return data.remove_columns("label").add_column("label", labels, feature=ClassLabel(names=names))


def sample(data: Dataset, most: int | None, seed: int) -> Dataset:
    """At most so many rows, chosen at random."""
    return data if most is None or most >= len(data) else data.shuffle(seed=seed).select(range(most))


def split_off(data: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Divide into two, each class in proportion. With too few images for that, the second part gets one of each class
    first, and never the last one of a class.

    Raises:
        InputError: No class has two images.
    """
    labels = data["label"][:]
    counts = Counter(labels)
    part = round(len(data) * fraction)
    if min(counts.values()) > 1 and len(counts) <= part <= len(data) - len(counts):
        divided = data.train_test_split(test_size=part, seed=seed, stratify_by_column="label")
        return divided["train"], divided["test"]
    order = np.random.default_rng(seed).permutation(len(data)).tolist()
    first_of_class = list({labels[index]: index for index in reversed(order)}.values())
    chosen: list[int] = []
    for index in dict.fromkeys([*first_of_class, *order]):
        if len(chosen) < max(part, 1) and counts[labels[index]] > 1:
            chosen.append(index)
            counts[labels[index]] -= 1
    if not chosen:
        raise InputError(
            "There is one image of each class, so none can be split off to validate on: add images, or give a "
            "validation split."
        )
    taken = set(chosen)
    return data.select([index for index in range(len(data)) if index not in taken]), data.select(chosen)
