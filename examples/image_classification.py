"""Adapt a vision transformer to an image classification task with E²VPT: the script to start from.

    python examples/image_classification.py examples/recipes/digits.yaml
    python examples/image_classification.py --model google/vit-base-patch16-224-in21k --dataset folder/of/images
    python examples/image_classification.py examples/recipes/vtab.yaml --dataset some/hub-dataset --seed 44

A recipe is a YAML or JSON file of options; options behind it override it. The script trains, keeps the best epoch,
evaluates it on the validation part, and on the test part if there is one; --do_train false, --do_eval false and
--do_predict false leave that out. --prune also removes the prompts that contribute least.

It needs the files next to it.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import console  # first: it hides what the others log as they are imported
import evaluate
import numpy as np
from augmentation import center_crop, horizontal_flip, random_crop, random_resized_crop, resize_shorter_side
from classification_arguments import Arguments, DataArguments, ModelArguments, names_of, parse
from classification_data import TOGETHER, load_splits
from datasets import ClassLabel, DatasetDict
from peft import PeftModel, get_peft_model
from PIL.Image import Image as PILImage
from PIL.Image import Resampling
from read_images import check_place, enumerate_some
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import EvalPrediction, SaveStrategy

from e2vpt_peft import (
    E2VPTConfig,
    E2VPTTrainer,
    ModelCardTrainer,
    PromptOptimizerFactory,
    PruningConfig,
    to_rgb,
)
from e2vpt_peft.trainer import last_whole_checkpoint


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
    raise console.InputError(f"The image processor has no fixed size, but {size}: it takes augmentation='none' only.")


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
    """Images and labels of a data set to the model's inputs; images of all kinds become RGB."""
    images = [to_rgb(image) for image in batch["image"]]
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


def check_labels(adapter: str, label: ClassLabel) -> None:
    """Refuse an adapter that was trained on other classes, as far as it says which.

    Raises:
        console.InputError: It was.
    """
    try:
        trained = list(AutoConfig.from_pretrained(adapter).id2label.values())
    except (OSError, ValueError):  # saved without its labels
        return
    if trained != label.names:
        raise console.InputError(
            f"The adapter in {adapter} was trained on {len(trained)} classes ({enumerate_some(trained)}), but the "
            f"data has {label.num_classes} ({enumerate_some(label.names)}): they must be the same, in the same order."
        )


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
    for option, name in (("model", args.model.model), ("adapter", args.model.adapter)):
        if name is not None:
            check_place(option, name)
    if Path(str(training.output_dir)).is_file():
        raise console.InputError(f"output_dir={training.output_dir!r} is a file: name a folder.")
    training.remove_unused_columns = False  # or Trainer would drop the images before they are preprocessed
    if training.load_best_model_at_end is None:
        has_both = training.eval_strategy == training.save_strategy == SaveStrategy.EPOCH
        # Images that were trained on, and those to test on, are not there to choose by.
        training.load_best_model_at_end = has_both and not args.data.train_on_validation
    if training.metric_for_best_model is None:
        training.metric_for_best_model, training.greater_is_better = Path(args.data.metric).name, True
    training.dataloader_pin_memory &= training.device.type != "cpu"
    training.disable_tqdm |= not sys.stderr.isatty()
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
    ratios = {name: getattr(args.model, name) for name in ("visual_prompt_lr_ratio", "kv_prompt_lr_ratio")}
    ratios = {name: ratio for name, ratio in ratios.items() if ratio is not None}
    if ratios:  # else one rate for all, by Trainer's own optimizer
        optimizer_cls, settings = Trainer.get_optimizer_cls_and_kwargs(args.training)
        settings = {**settings, "weight_decay": args.training.weight_decay, **ratios}
        options["optimizer_cls_and_kwargs"] = (PromptOptimizerFactory, {"optimizer_cls": optimizer_cls, **settings})
    if not args.pruning.prune:
        if TOGETHER in data:
            options.update(train_dataset=data[TOGETHER], eval_dataset=data["test"])
        return ModelCardTrainer(**options)
    names = names_of(PruningConfig) - names_of(TrainingArguments)
    config = PruningConfig(**{name: getattr(args.pruning, name) for name in names})
    return E2VPTTrainer(**options, pruning_config=config, final_train_dataset=data.get(TOGETHER))


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run the script; returns all metrics."""
    console.hide_notices()
    args = parse(sys.argv[1:] if argv is None else argv, __doc__)
    settle(args)
    training = args.training
    set_seed(training.seed)
    with training.main_process_first(desc="loading data"):
        data = load_splits(args.data)
    label: ClassLabel = data["train"].features["label"]
    if args.model.adapter is not None:
        check_labels(args.model.adapter, label)
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
    if args.model.save_backbone and trainer.is_world_process_zero():
        model.unload().save_pretrained(str(training.output_dir))
    return results


if __name__ == "__main__":
    console.run(main)
