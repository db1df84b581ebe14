"""Adapt a vision transformer to an image classification task with E²VPT: the script to start from.

    python examples/image_classification.py examples/recipes/digits.yaml
    python examples/image_classification.py examples/recipes/vtab.yaml --dataset some/hub-dataset --seed 44
    python examples/image_classification.py --model google/vit-base-patch16-224-in21k --dataset folder/of/images

Options are those of [`ModelArguments`], [`DataArguments`], `E2VPTConfig`, `PruningConfig` and `TrainingArguments`;
`--help` lists them. `--prune` also finds and removes the prompts that do not pay. A recipe is a YAML or JSON file of
options; flags behind it override it. The script trains, evaluates on the validation part, and on the test part if
there is one; `--do_train false`, `--do_eval false` and `--do_predict false` leave that out.

Needs the files next to it: `augmentation.py`, and `metrics/accuracy` unless `--metric` names another.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Optional, get_type_hints

import evaluate
import numpy as np
import yaml
from augmentation import center_crop, horizontal_flip, random_crop, random_resized_crop, resize_shorter_side
from datasets import ClassLabel, Dataset, DatasetDict, Image, concatenate_datasets, load_dataset
from peft import PeftConfig, PeftModel, get_peft_model
from PIL.Image import Image as PILImage
from PIL.Image import Resampling
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    HfArgumentParser,
    PreTrainedModel,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import EvalPrediction

from e2vpt_peft import E2VPTConfig, E2VPTTrainer, ModelCardTrainer, PruningConfig
from e2vpt_peft.trainer import last_whole_checkpoint

HERE = Path(__file__).parent

DEFAULTS: dict[str, Any] = {
    "output_dir": "e2vpt-output",
    "do_train": True,
    "do_eval": True,
    "do_predict": True,
    "num_train_epochs": 30,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "learning_rate": 5e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "logging_steps": 20,
}
"""Where this script departs from the defaults of `TrainingArguments`, which are made for whole models."""

TOGETHER = "train_and_validation"
"""The split with the training and the validation images."""


@dataclass
class ModelArguments:
    """The backbone."""

    model: str = field(default=str(HERE / "backbone"), metadata={"help": "Backbone: a Hub id or a folder."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the backbone."})
    adapter: Optional[str] = field(
        default=None, metadata={"help": "Start from this saved adapter (Hub id or folder), to evaluate or to go on."}
    )
    attn_implementation: Optional[str] = field(
        default=None, metadata={"help": "Attention of the backbone: eager, sdpa, flash_attention_2, flex_attention."}
    )
    base_learning_rate: Optional[float] = field(
        default=None,
        metadata={"help": "Learning rate for 256 images a step; sets learning_rate in proportion to the batch size."},
    )


@dataclass
class DataArguments:
    """The images."""

    dataset: Optional[str] = field(
        default=None,
        metadata={"help": "Hub id, folder of images or parquet, or parquet file; default: scikit-learn's digits."},
    )
    dataset_config: Optional[str] = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    validation_split: Optional[str] = field(
        default=None, metadata={"help": "Split to evaluate on while training; found by its usual names if not given."}
    )
    test_split: Optional[str] = field(
        default=None, metadata={"help": "Split to evaluate on at the end; 'test' if not given and there."}
    )
    validation_fraction: float = field(
        default=0.2, metadata={"help": "Share of the training images to evaluate on if there is no validation split."}
    )
    split_seed: int = field(
        default=0, metadata={"help": "Seed by which images are chosen and split off; seed is that of the training."}
    )
    train_on_validation: bool = field(
        default=False,
        metadata={
            "help": (
                "Train on the validation images as well (with --prune, after the search), and evaluate on the test "
                "split alone."
            )
        },
    )
    max_train_samples: Optional[int] = field(
        default=None, metadata={"help": "Use so many training images, the ones to be split off included."}
    )
    max_eval_samples: Optional[int] = field(
        default=None, metadata={"help": "Use so many validation images and so many test images."}
    )
    image_column: Optional[str] = field(default=None, metadata={"help": "Column of images; found if not given."})
    label_column: Optional[str] = field(default=None, metadata={"help": "Column of labels; found if not given."})
    augmentation: Literal["none", "resized_crop", "crop"] = field(
        default="none",
        metadata={
            "help": (
                "none: as the image processor resizes; resized_crop: a random part, resized; crop: resized to 8/7 of "
                "the model's size, then a random part to train on and the middle to evaluate on."
            )
        },
    )
    min_crop_area: float = field(
        default=0.08, metadata={"help": "Smallest part of the image that resized_crop takes, as a share of its area."}
    )
    horizontal_flip: bool = field(default=False, metadata={"help": "Mirror every other training image, at random."})
    image_mean: Optional[list[float]] = field(
        default=None, metadata={"help": "Mean of each channel; the image processor's own if not given."}
    )
    image_std: Optional[list[float]] = field(
        default=None, metadata={"help": "Standard deviation of each channel; the image processor's own if not given."}
    )
    metric: str = field(
        default=str(HERE / "metrics" / "accuracy"),
        metadata={"help": "Metric for evaluate.load: a Hub id or a folder."},
    )

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction={self.validation_fraction!r} must be between 0 and 1.")
        if not 0 < self.min_crop_area <= 1:
            raise ValueError(f"min_crop_area={self.min_crop_area!r} must be above 0 and at most 1.")


def arguments_of(
    config_class: type, name: str, leave_out: set[str], types: dict[str, Any], extra: list[Any] | None = None
) -> type:
    """A dataclass for `HfArgumentParser` with the fields, defaults and help texts of a config class.

    Args:
        config_class (`type`): A dataclass.
        name (`str`): The name of the new one.
        leave_out (`set[str]`): Fields that are no options.
        types (`dict[str, Any]`): Types for fields whose own type has no form on the command line.
        extra (`list[Any] | None`): More fields, as `dataclasses.make_dataclass` takes them.
    """
    hints = get_type_hints(config_class)

    def help_of(option: dataclasses.Field) -> str:
        return str(option.metadata.get("help", "")).replace("%", "%%")  # a % means something to argparse

    options = [
        (
            option.name,
            types.get(option.name, hints[option.name]),
            field(
                default=option.default,
                default_factory=option.default_factory,
                metadata={"help": help_of(option)},
            ),
        )
        for option in dataclasses.fields(config_class)
        if option.init and option.name not in leave_out
    ]
    return dataclasses.make_dataclass(name, [*(extra or []), *options])


def names_of(*classes: type) -> set[str]:
    """The fields of dataclasses."""
    return {option.name for cls in classes for option in dataclasses.fields(cls)}


PromptArguments = arguments_of(
    E2VPTConfig,
    "PromptArguments",
    leave_out={*names_of(PeftConfig), "backbone", "token_mask", "segment_mask"},
    types={"layers_to_transform": Optional[list[int]]},
)
"""What `E2VPTConfig` takes, but for what is filled in when the adapter is made."""

PRUNE = ("prune", bool, field(default=False, metadata={"help": "Prune the trained prompts, rewind and train again."}))
PruningArguments = arguments_of(
    PruningConfig, "PruningArguments", leave_out=names_of(TrainingArguments), types={}, extra=[PRUNE]
)
"""`--prune`, and what `PruningConfig` takes; `metric_for_best_model` and the like stand in `TrainingArguments`."""


class Arguments(NamedTuple):
    """All options."""

    model: ModelArguments
    data: DataArguments
    prompts: Any
    pruning: Any
    training: TrainingArguments


def parse(argv: list[str]) -> Arguments:
    """Read options from the command line, and from a recipe file if the first of them is one.

    Raises:
        ValueError: The recipe has an option that there is not.
    """
    parser = HfArgumentParser(
        [ModelArguments, DataArguments, PromptArguments, PruningArguments, TrainingArguments],  # type: ignore[list-item]
        description=__doc__,
        usage="%(prog)s [recipe.yaml | recipe.json] [options]",
    )
    parser.set_defaults(**DEFAULTS)
    if argv and argv[0].endswith((".yaml", ".yml", ".json")):
        # As defaults, values go through the parser, which reads 1e-3, a string to YAML, as the number that is meant.
        parser.set_defaults(**read_recipe(Path(argv[0]), names_of(*parser.dataclass_types)))
        argv = argv[1:]
    return Arguments(*parser.parse_args_into_dataclasses(argv, look_for_args_file=False))


def read_recipe(path: Path, allowed: set[str]) -> dict[str, Any]:
    """The options in a YAML or JSON file."""
    text = path.read_text(encoding="utf-8")
    recipe = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} must map options to values, but is a {type(recipe).__name__}.")
    for name in recipe:
        if name not in allowed:
            close = difflib.get_close_matches(str(name), allowed, n=1)
            raise ValueError(f"{path}: there is no option {name!r}" + (f"; {close[0]!r} is meant?" if close else "."))
    return recipe


def load_digits() -> DatasetDict:
    """The handwritten digits that come with scikit-learn, half of them to test on."""
    from data_and_backbone import load_digits

    return load_digits()["train"].train_test_split(test_size=0.5, seed=0, stratify_by_column="label")


def load_splits(args: DataArguments) -> DatasetDict:
    """A training, a validation and, if there is one, a test split, with columns `image` and `label`.

    With `train_on_validation` there is also one of the training and validation images together. A missing validation
    split is cut off the training split; which images go where depends on `split_seed` alone.

    Raises:
        ValueError: A split or a column is not there, or `train_on_validation` leaves nothing to evaluate on.
    """
    if args.dataset is None:
        found = load_digits()
    elif Path(args.dataset).is_file():
        found = load_dataset("parquet", data_files=args.dataset)
    else:
        found = load_dataset(args.dataset, args.dataset_config)
    for option in ("train_split", "validation_split", "test_split"):
        if getattr(args, option) not in (None, *found):
            raise ValueError(f"{option}={getattr(args, option)!r} is not there: the splits are {', '.join(found)}.")
    validation_name = args.validation_split or next(
        (n for n in ("validation", "valid", "val", "dev") if n in found), None
    )
    test_name = args.test_split or ("test" if "test" in found and validation_name != "test" else None)

    train = found[args.train_split]
    image = args.image_column or find_column(train, (Image,), ("image", "img", "pixel_values"))
    label = args.label_column or find_column(train, (ClassLabel,), ("label", "labels", "fine_label", "class"))
    train = tidy(train, image, label, None)
    names = train.features["label"].names
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
        raise ValueError("train_on_validation leaves nothing to evaluate on: there is no test split.")
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
        raise ValueError(
            f"None of the columns {', '.join(data.features)} is clearly the {usual_names[0]}: set "
            f"{usual_names[0]}_column."
        )
    return found[0]


def tidy(data: Dataset, image: str, label: str, names: list[str] | None) -> Dataset:
    """Columns `image` and `label`, labels as classes: those of `names`, or those that the data has."""
    for option, column in (("image_column", image), ("label_column", label)):
        if column not in data.features:
            raise ValueError(f"{option}={column!r} is not there: the columns are {', '.join(data.features)}.")
    data = data.select_columns([image, label]).rename_columns({image: "image", label: "label"})
    if not isinstance(data.features["image"], Image):
        data = data.cast_column("image", Image())
    if isinstance(data.features["label"], ClassLabel):
        return data
    values = data["label"][:]
    names = names or [str(value) for value in sorted(set(values))]
    index = {name: position for position, name in enumerate(names)}
    if unknown := sorted({str(value) for value in values} - set(index)):
        raise ValueError(
            f"The labels {', '.join(unknown[:5])} are not among those to train on: {', '.join(names[:10])}."
        )
    labels = [index[str(value)] for value in values]
    return data.remove_columns("label").add_column("label", labels, feature=ClassLabel(names=names))


def sample(data: Dataset, most: int | None, seed: int) -> Dataset:
    """At most so many rows, chosen at random."""
    return data if most is None or most >= len(data) else data.shuffle(seed=seed).select(range(most))


def split_off(data: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Divide into two, each class in proportion where that is possible."""
    counts = Counter(data["label"][:]).values()
    part = round(len(data) * fraction)
    can_stratify = min(counts) > 1 and len(counts) <= part <= len(data) - len(counts)
    stratify = "label" if can_stratify else None
    divided = data.train_test_split(test_size=part, seed=seed, stratify_by_column=stratify)
    return divided["train"], divided["test"]


def load_processor(model_args: ModelArguments, data_args: DataArguments) -> Any:
    """The backbone's image processor, with another mean and standard deviation if told so."""
    processor = AutoImageProcessor.from_pretrained(model_args.model, revision=model_args.model_revision)
    processor.image_mean = data_args.image_mean or processor.image_mean
    processor.image_std = data_args.image_std or processor.image_std
    return processor


def input_size(processor: Any) -> tuple[int, int]:
    """Height and width of the images that an image processor makes."""
    size = processor.size
    if getattr(processor, "do_center_crop", False):
        size = processor.crop_size
    if getattr(size, "height", None):
        return size.height, size.width
    if getattr(size, "shortest_edge", None):
        return size.shortest_edge, size.shortest_edge
    raise ValueError(f"The image processor has no fixed size, but {size}: augmentation={'none'!r} is all it takes.")


Transform = Callable[[PILImage], PILImage]


def make_transforms(args: DataArguments, processor: Any) -> tuple[Transform | None, Transform | None]:
    """What is done to images to train on, and to images to evaluate on, in front of the processor.

    `None` leaves resizing to the processor; a transform returns images of the model's size.
    """
    if args.augmentation == "none":
        return None, None
    size = input_size(processor)
    resample = Resampling.BILINEAR if getattr(processor, "resample", None) is None else processor.resample
    if args.augmentation == "resized_crop":
        scale = (args.min_crop_area, 1.0)
        return partial(random_resized_crop, size=size, scale=scale, resample=resample), None
    larger = (round(size[0] * 8 / 7), round(size[1] * 8 / 7))
    train, evaluation = (
        partial(resize_and_crop, larger=larger, crop=partial(crop, size=size), resample=resample)
        for crop in (random_crop, center_crop)
    )
    return train, evaluation


def resize_and_crop(image: PILImage, larger: tuple[int, int], crop: Transform, resample: int) -> PILImage:
    """Make an image just cover a size, and crop that."""
    return crop(resize_shorter_side(image, larger, resample))


def preprocess(
    batch: dict[str, list], processor: Any, transform: Transform | None, flip: bool = False
) -> dict[str, Any]:
    """Images and labels of a data set to the model's inputs; grey images become colour."""
    images = [image.convert("RGB") for image in batch["image"]]
    if transform is not None:
        images = [transform(image) for image in images]
    if flip:
        images = [horizontal_flip(image) for image in images]
    resized = {"do_resize": False, "do_center_crop": False} if transform is not None else {}
    pixels = processor(images, return_tensors="pt", **resized)["pixel_values"]
    return {"pixel_values": pixels, "labels": batch["label"]}


def load_backbone(args: ModelArguments, label: ClassLabel) -> PreTrainedModel:
    """The pretrained model with a head for the labels; a head of another size is replaced by a new one."""
    return AutoModelForImageClassification.from_pretrained(
        args.model,
        revision=args.model_revision,
        id2label=dict(enumerate(label.names)),
        label2id={name: index for index, name in enumerate(label.names)},
        ignore_mismatched_sizes=True,
        attn_implementation=args.attn_implementation,
    )


def head_names(model: nn.Module) -> list[str]:
    """The modules of a classification model that are its head: those at its top that are no stack of layers."""
    return [
        name
        for name, child in model.named_children()
        if any(True for _ in child.parameters())
        and not any(isinstance(module, nn.ModuleList) for module in child.modules())
    ]


def adapt(backbone: PreTrainedModel, args: ModelArguments, prompts: Any, trainable: bool) -> PeftModel:
    """Give the backbone a new adapter, or load a saved one."""
    if args.adapter is not None:
        return PeftModel.from_pretrained(backbone, args.adapter, is_trainable=trainable)
    options = {option.name: getattr(prompts, option.name) for option in dataclasses.fields(prompts)}
    if options["modules_to_save"] is None:
        options["modules_to_save"] = head_names(backbone)
    return get_peft_model(backbone, E2VPTConfig(**options))


def make_compute_metrics(name: str) -> Callable[[EvalPrediction], dict[str, float]]:
    """A function for `Trainer` that computes a metric of `evaluate`."""
    metric = evaluate.load(name, keep_in_memory=True)

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        return metric.compute(predictions=np.asarray(logits).argmax(1), references=prediction.label_ids)

    return compute


def checkpoint_to_resume(args: TrainingArguments, prune: bool) -> str | bool | None:
    """Where to go on: `--resume_from_checkpoint true` finds the last checkpoint, and starts anew if there is none."""
    wanted = args.resume_from_checkpoint
    if wanted is None or str(wanted).lower() in ("false", "no"):
        return None
    if str(wanted).lower() not in ("true", "yes"):
        return wanted
    if prune:
        return True  # E2VPTTrainer knows where it was
    return last_whole_checkpoint(args.output_dir)


def settle(args: Arguments) -> None:
    """Fill in the training arguments that follow from others."""
    training = args.training
    training.remove_unused_columns = False  # or Trainer would drop the images before they are preprocessed
    if args.pruning.prune and training.metric_for_best_model is None:
        training.metric_for_best_model, training.greater_is_better = Path(args.data.metric).name, True
    training.dataloader_pin_memory &= training.device.type != "cpu"
    if args.model.base_learning_rate is not None:
        images = training.train_batch_size * training.world_size * training.gradient_accumulation_steps
        training.learning_rate = args.model.base_learning_rate * images / 256


def make_trainer(
    args: Arguments, model: PeftModel, processor: Any, data: DatasetDict, metric: Callable[..., dict[str, float]]
) -> ModelCardTrainer:
    """A `Trainer` that writes a full model card; with `--prune`, it also prunes, rewinds and trains again."""
    options: dict[str, Any] = {
        "model": model,
        "args": args.training,
        "train_dataset": data["train"],
        "eval_dataset": data["validation"],
        "compute_metrics": metric,
        "processing_class": processor,
    }
    if not args.pruning.prune:
        if TOGETHER in data:
            options.update(train_dataset=data[TOGETHER], eval_dataset=data["test"])
        return ModelCardTrainer(**options)
    names = names_of(PruningConfig) - names_of(TrainingArguments)
    config = PruningConfig(**{name: getattr(args.pruning, name) for name in names})
    return E2VPTTrainer(**options, pruning_config=config, final_train_dataset=data.get(TOGETHER))


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run the script; returns all metrics."""
    args = parse(sys.argv[1:] if argv is None else argv)
    settle(args)
    training = args.training
    set_seed(training.seed)
    with training.main_process_first(desc="loading data"):
        data = load_splits(args.data)
    label: ClassLabel = data["train"].features["label"]
    processor = load_processor(args.model, args.data)
    train_transform, evaluation_transform = make_transforms(args.data, processor)
    for split, images in data.items():
        to_train_on = split in ("train", TOGETHER)
        prepare = partial(
            preprocess,
            processor=processor,
            transform=train_transform if to_train_on else evaluation_transform,
            flip=to_train_on and args.data.horizontal_flip,
        )
        data[split] = images.with_transform(prepare)

    backbone = load_backbone(args.model, label)
    model = adapt(backbone, args.model, args.prompts, trainable=training.do_train)
    trainer = make_trainer(args, model, processor, data, make_compute_metrics(args.data.metric))
    if trainer.is_world_process_zero():
        counts = ", ".join(f"{len(images)} {split}" for split, images in data.items())
        print(f"{args.data.dataset or 'handwritten digits'}: {label.num_classes} classes; images: {counts}")
        model.print_trainable_parameters()

    results: dict[str, float] = {}

    def report(split: str, metrics: dict[str, float]) -> None:
        trainer.log_metrics(split, metrics)
        trainer.save_metrics(split, metrics)
        results.update(metrics)

    if training.do_train:
        output = trainer.train(resume_from_checkpoint=checkpoint_to_resume(training, args.pruning.prune))
        trainer.save_model()  # the adapter, and the image processor
        trainer.save_state()
        output.metrics.pop("pruning_candidates", None)  # a table, which stands in pruning_results.json
        trainable, total = model.get_nb_trainable_parameters()
        report("train", {**output.metrics, "trainable_parameters": trainable, "total_parameters": total})
        if trainer.is_world_process_zero():  # names and number of the labels, which a new backbone needs to know
            backbone.config.save_pretrained(str(training.output_dir))
    if training.do_eval and not args.data.train_on_validation:
        report("eval", trainer.evaluate())
    if training.do_predict and "test" in data:
        report("test", trainer.evaluate(data["test"], metric_key_prefix="test"))

    if training.do_train:
        card: dict[str, Any] = {
            "finetuned_from": args.model.model,
            "dataset": args.data.dataset or "scikit-learn handwritten digits",
            "dataset_args": args.data.dataset_config,
        }
        if trainer.eval_dataset is data.get("test"):  # with train_on_validation
            card["eval_split"] = "test"
        if training.push_to_hub:
            trainer.push_to_hub(**card)
        elif trainer.is_world_process_zero():
            trainer.create_model_card(**card)
    return results


if __name__ == "__main__":
    main()
