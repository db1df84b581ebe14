"""Before a search begins: its data are tried, and what its results depend on is written down."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers.trainer_callback import ExportableState

from ..adapter import PromptedAdapter
from ..pruning.probe import Probe, as_inputs, undisturbed
from .config import Metric, PruningConfig
from .data import DataSample
from .fingerprints import describe, describe_backbone
from .settings import settings_of_adapter, settings_of_arguments

TRAIN, FINAL_TRAIN = "train_dataset", "final_train_dataset"
"""Attributes of a Trainer with what a phase is trained on."""

FUNCTIONS = (
    "compute_metrics",
    "compute_loss_func",
    "data_collator",
    "preprocess_logits_for_metrics",
    "optimizer_cls_and_kwargs",
)
"""Attributes of a Trainer with code that results depend on."""


def look_at_data(trainer: Any, adapter: PromptedAdapter) -> dict[str, DataSample]:
    """Look at some samples of each data set, and try those to train on: they need labels, and the model a loss.

    Args:
        trainer (`E2VPTTrainer`): The Trainer that has the data sets.
        adapter ([`PromptedAdapter`]): The adapter.

    Returns:
        `dict[str, DataSample]`: By the names of the Trainer's attributes, without the batches.

    Raises:
        ValueError: The model returns no loss for a batch.
    """
    named = {TRAIN: trainer.train_dataset, FINAL_TRAIN: trainer.final_train_dataset}
    if isinstance(trainer.eval_dataset, dict):
        named.update({f"eval_dataset.{name}": dataset for name, dataset in trainer.eval_dataset.items()})
    else:
        named["eval_dataset"] = trainer.eval_dataset
    found = {}
    for name, dataset in named.items():
        if dataset is None:
            continue
        sample = DataSample.of(trainer.get_test_dataloader(dataset), name)
        if sample.batch is not None and name in (TRAIN, FINAL_TRAIN):
            with undisturbed(adapter), trainer.accelerator.autocast():
                Probe(adapter, as_inputs(adapter.model, sample.batch)).value()
        found[name] = dataclasses.replace(sample, batch=None)
    return found


def settings_of(
    trainer: Any, adapter: PromptedAdapter, config: PruningConfig, metric: Metric, data: dict[str, DataSample]
) -> dict[str, Any]:
    """All that the results of a search depend on, as far as it can be seen.

    Args:
        trainer (`E2VPTTrainer`): The Trainer.
        adapter ([`PromptedAdapter`]): The adapter.
        config ([`PruningConfig`]): The search.
        metric ([`Metric`]): What decides.
        data (`dict[str, DataSample]`): Samples of the data sets.

    Returns:
        `dict[str, Any]`: Nested, by what they belong to.
    """
    counting = [c for c in trainer.callback_handler.callbacks if isinstance(c, ExportableState)]
    decides = {"metric_for_best_model": metric.name, "greater_is_better": metric.greater_is_better}
    return {
        "arguments": settings_of_arguments(trainer.args),
        "adapter": settings_of_adapter(adapter.config),
        "pruning": {**dataclasses.asdict(config), **decides},
        "data": {name: sample.describe() for name, sample in data.items()},
        "backbone": describe_backbone(adapter),
        "trainer": {
            "class": type(trainer).__qualname__,
            "callbacks": [[type(callback).__qualname__, describe(callback.state()["args"])] for callback in counting],
            **{name: describe(getattr(trainer, name)) for name in FUNCTIONS},
        },
        "processes": {
            "number": trainer.args.world_size,
            "devices": trainer.args.n_gpu,
            "device": trainer.args.device.type,
            "kind": str(trainer.accelerator.distributed_type),
            "mixed_precision": trainer.accelerator.mixed_precision,
        },
    }
