"""Images with few labels, and a pretrained backbone with a new head for them: what several examples start from.

`quickstart.py` adapts this backbone to these images, and the benchmarks (`benchmarks/`) measure on them;
`image_classification.py` takes the digits. So a change here changes what all of them do.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from console import InputError
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from read_images import read_dataset
from transformers import AutoModelForImageClassification, PreTrainedModel, set_seed

from e2vpt_peft import to_rgb

BACKBONE = str(Path(__file__).parent / "backbone")
"""The small ViT that comes with the repository."""
HEAD = "classifier"
"""What transformers calls the head of an image classifier."""


def load_digits() -> DatasetDict:
    """The 1,797 real handwritten digits that come with scikit-learn (8 x 8 pixels, grey)."""
    import PIL.Image
    from sklearn import datasets

    digits = datasets.load_digits()
    images = [PIL.Image.fromarray((image * 255 / 16).astype(np.uint8)) for image in digits.images]
    features = Features({"image": Image(), "label": ClassLabel(names=[str(name) for name in digits.target_names])})
    return DatasetDict(train=Dataset.from_dict({"image": images, "label": digits.target}, features=features))


def load_data(dataset: str | None, train_per_class: int, max_test_images: int, seed: int) -> tuple[Dataset, Dataset]:
    """A training split of `train_per_class` images per class, and a test split, with columns `image` and `label`.

    Args:
        dataset (`str`, *optional*): A Hub id, a folder of images (one subfolder per class), a parquet file or a folder
            of them; else scikit-learn's digits.
        train_per_class (`int`): Images per class to train on. If there is no test split, the others are it.
        max_test_images (`int`): Of more, so many are drawn.
        seed (`int`): Of what is drawn.

    Raises:
        InputError: The images are not sorted into two classes or more, or none is left to test on.
    """
    splits = load_digits() if dataset is None else read_dataset(dataset)
    train = splits["train"] if "train" in splits else next(iter(splits.values()))
    test = next((splits[name] for name in ("test", "validation", "val", "valid") if name in splits), None)

    image = next(name for name, feature in train.features.items() if isinstance(feature, Image))
    labels = [name for name, feature in train.features.items() if isinstance(feature, ClassLabel)]
    label = labels[0] if labels else "label"
    columns = {"image": image, "label": label}

    def tidy(data: Dataset) -> Dataset:
        data = data.select_columns(list(columns.values())).rename_columns({old: new for new, old in columns.items()})
        return data if labels else data.class_encode_column("label")

    train = tidy(train)
    few: list[int] = []
    rest: list[int] = []
    count: dict[int, int] = defaultdict(int)
    all_labels = train["label"][:]
    for index in np.random.default_rng(seed).permutation(len(train)).tolist():
        count[all_labels[index]] += 1
        (few if count[all_labels[index]] <= train_per_class else rest).append(index)
    test = train.select(rest) if test is None else tidy(test).shuffle(seed=seed)
    if len(test) == 0:
        raise InputError(f"train_per_class={train_per_class} leaves no image to test on.")
    return train.select(few), test.select(range(min(len(test), max_test_images)))


def preprocess(processor: Any, batch: dict[str, list], augmentation: float = 0.0) -> dict[str, Any]:
    """Images and labels of a data set to the model's inputs; images of all kinds become RGB.

    With `augmentation`, each image is shifted, turned, stretched and sheared a little, differently every time.
    """
    images = [to_rgb(image) for image in batch["image"]]
    pixel_values = processor(images, return_tensors="pt")["pixel_values"]
    if augmentation:
        maps = torch.eye(2, 3) + augmentation * torch.randn(len(images), 2, 3)
        grid = F.affine_grid(maps, list(pixel_values.shape), align_corners=False)
        pixel_values = F.grid_sample(pixel_values, grid, padding_mode="border", align_corners=False)
    return {"pixel_values": pixel_values, "labels": batch["label"]}


def load_backbone(model: str, label: ClassLabel, seed: int) -> PreTrainedModel:
    """The pretrained model in float32, with a new head for the labels, initialised from the seed."""
    set_seed(seed)
    return AutoModelForImageClassification.from_pretrained(
        model,
        num_labels=label.num_classes,
        id2label=dict(enumerate(label.names)),
        label2id={name: index for index, name in enumerate(label.names)},
        ignore_mismatched_sizes=True,
        dtype=torch.float32,
    )
