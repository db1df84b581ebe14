"""The options of `image_classification.py`: what they are, how they are read, and what is said of mistakes in them."""

from __future__ import annotations

import dataclasses
import difflib
import json
from argparse import Action, ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Optional, get_type_hints

import yaml
from console import InputError
from peft import PeftConfig
from transformers import HfArgumentParser, TrainingArguments

from e2vpt_peft import E2VPTConfig, PruningConfig

HERE = Path(__file__).parent

FIRST = (
    "help",
    "model",
    "dataset",
    "output_dir",
    "num_visual_prompts",
    "num_kv_prompts",
    "num_train_epochs",
    "learning_rate",
    "per_device_train_batch_size",
    "augmentation",
    "prune",
)
"""What `--help` begins with."""

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
    "load_best_model_at_end": None,  # `settle` decides, unless it is given
}
"""Where this script departs from the defaults of `TrainingArguments`, which are made for whole models."""


@dataclass
class ModelArguments:
    """The backbone."""

    _argument_group_name = "backbone"

    model: str = field(default=str(HERE / "backbone"), metadata={"help": "Backbone: a Hub id or a folder."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the backbone."})
    adapter: Optional[str] = field(
        default=None, metadata={"help": "Start from this saved adapter (Hub id or folder), to evaluate or to go on."}
    )
    save_backbone: bool = field(
        default=False,
        metadata={"help": "Save the backbone beside the adapter, so that pipeline(model=output_dir) loads both."},
    )
    attn_implementation: Optional[str] = field(
        default=None, metadata={"help": "Attention of the backbone: eager, sdpa, flash_attention_2, flex_attention."}
    )
    base_learning_rate: Optional[float] = field(
        default=None,
        metadata={"help": "Learning rate for 256 images a step; sets learning_rate in proportion to the batch size."},
    )
    visual_prompt_lr_ratio: Optional[float] = field(
        default=None,
        metadata={"help": "Give visual prompts so many times learning_rate, see e2vpt_peft.create_optimizer."},
    )
    kv_prompt_lr_ratio: Optional[float] = field(
        default=None, metadata={"help": "Give key-value prompts so many times learning_rate, likewise."}
    )


@dataclass
class DataArguments:
    """The images."""

    _argument_group_name = "images"

    dataset: Optional[str] = field(
        default=None,
        metadata={
            "help": (
                "Folder with a subfolder of images per class, Hub id, or parquet; default: scikit-learn's digits."
            )
        },
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
    check_images: bool = field(
        default=True, metadata={"help": "Decode all images before the training, to name those that cannot be read."}
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
    config_class: type, group: str, leave_out: set[str], types: dict[str, Any], extra: list[Any] | None = None
) -> type:
    """A dataclass for `HfArgumentParser` with the fields, defaults and help texts of a config class.

    Args:
        config_class (`type`): A dataclass.
        group (`str`): Under which heading `--help` lists them.
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
    return dataclasses.make_dataclass(
        f"{config_class.__name__}Options", [*(extra or []), *options], namespace={"_argument_group_name": group}
    )


def names_of(*classes: type) -> set[str]:
    """The fields of dataclasses."""
    return {option.name for cls in classes for option in dataclasses.fields(cls)}


PromptArguments = arguments_of(
    E2VPTConfig,
    "prompts: E2VPTConfig",
    leave_out={*names_of(PeftConfig), "backbone", "token_mask", "segment_mask"},
    types={
        "layers_to_transform": Optional[list[int]],
        # Which of a union of several types `HfArgumentParser` takes depends on what was imported before.
        **dict.fromkeys(("target_modules", "exclude_modules", "layers_pattern"), Optional[str]),
    },
)
"""What `E2VPTConfig` takes, but for what is filled in when the adapter is made."""

PRUNE = ("prune", bool, field(default=False, metadata={"help": "Prune the trained prompts, rewind and train again."}))
PruningArguments = arguments_of(
    PruningConfig,
    "pruning, with --prune: PruningConfig",
    leave_out=names_of(TrainingArguments),
    types={},
    extra=[PRUNE],
)
"""`--prune`, and what `PruningConfig` takes; `metric_for_best_model` and the like stand in `TrainingArguments`."""


class Arguments(NamedTuple):
    """All options."""

    model: ModelArguments
    data: DataArguments
    prompts: Any
    pruning: Any
    training: TrainingArguments


class OneSpelling(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """The description as it is, `--an_option` without `--an-option`, and defaults where there are any."""

    def _format_action_invocation(self, action: Action) -> str:
        spellings, action.option_strings = action.option_strings, list(action.option_strings)[:1]
        try:
            return super()._format_action_invocation(action)
        finally:
            action.option_strings = spellings

    def _get_help_string(self, action: Action) -> str | None:
        return action.help if action.default in (None, False, []) else super()._get_help_string(action)


def make_parser(description: str | None) -> HfArgumentParser:
    """The parser of all options, in groups, those to know first at the top."""
    parser = HfArgumentParser(
        [ModelArguments, DataArguments, PromptArguments, PruningArguments, TrainingArguments],  # type: ignore[list-item]
        description=description,
        usage="%(prog)s [recipe.yaml | recipe.json] [options]",
        formatter_class=OneSpelling,
    )
    parser.set_defaults(**DEFAULTS)
    rest = parser._optionals
    rest.title = "training: all of transformers' TrainingArguments"
    first = parser.add_argument_group("the ten to know first")
    for group in parser._action_groups:
        moved = [action for action in group._group_actions if action.dest in FIRST and group is not first]
        group._group_actions[:] = [action for action in group._group_actions if action not in moved]
        first._group_actions += moved
    first._group_actions.sort(key=lambda action: FIRST.index(action.dest))
    others = [group for group in parser._action_groups if group not in (first, rest)]
    parser._action_groups[:] = [first, *others, rest]
    return parser


def parse(argv: list[str], description: str | None = None) -> Arguments:
    """Read options from the command line, and from a recipe file if the first of them is one.

    Raises:
        InputError: The recipe cannot be read, or has an option that there is not.
        SystemExit: The command line has an option that there is not, or a value of the wrong kind.
    """
    parser = make_parser(description)
    known = names_of(*parser.dataclass_types)
    if argv and argv[0].endswith((".yaml", ".yml", ".json")):
        # As defaults, values go through the parser, which reads 1e-3, a string to YAML, as the number that is meant.
        parser.set_defaults(**read_recipe(Path(argv[0]), known))
        argv = argv[1:]
    *groups, unknown = parser.parse_args_into_dataclasses(
        argv, look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        parser.error(explain_unknown(unknown, known))
    return Arguments(*groups)


def explain_unknown(words: Iterable[str], known: set[str]) -> str:
    """A sentence about what the parser could not make use of."""
    flags = [word.split("=")[0].lstrip("-").replace("-", "_") for word in words if word.startswith("--")]
    if flags:
        return "; ".join(no_such_option(flag, known, "--") for flag in flags)
    return f"{' '.join(words)} belongs to no option; a recipe goes in front of all options."


def no_such_option(name: str, known: set[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"there is no option {prefix}{name}" + (f"; did you mean {prefix}{close[0]}?" if close else ".")


def read_recipe(path: Path, allowed: set[str]) -> dict[str, Any]:
    """The options in a YAML or JSON file."""
    if not path.is_file():
        raise InputError(f"There is no recipe {path}.")
    text = path.read_text(encoding="utf-8")
    try:
        recipe = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(recipe, dict):
        raise InputError(f"{path} must map options to values, but is a {type(recipe).__name__}.")
    for name in recipe:
        if name not in allowed:
            raise InputError(f"{path}: {no_such_option(str(name), allowed)}")
    return recipe
