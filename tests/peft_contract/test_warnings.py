"""What a library is about to change: a user of prompts is warned of nothing that a user of LoRA is not warned of."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel, Trainer, TrainingArguments
from transformers.utils.logging import warning_once

from ..support.models import images, randomized, tiny_vit
from .common import DEEP, SHALLOW, small_config

CHECKPOINTING = "activation_checkpointing"
if CHECKPOINTING not in inspect.signature(TrainingArguments).parameters:
    CHECKPOINTING = "gradient_checkpointing"


def tiny_bert() -> PreTrainedModel:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return randomized(BertForSequenceClassification(BertConfig(**sizes, vocab_size=50)))


BACKBONES: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, torch.Tensor]]] = {
    "vit": (tiny_vit, {"pixel_values": images()}),
    "bert": (tiny_bert, {"input_ids": torch.arange(18).view(3, 6), "attention_mask": torch.ones(3, 6).long()}),
}


@contextmanager
def warned() -> Iterator[set[str]]:
    """The warnings in this context, those that transformers gives once in a process as well."""
    found: set[str] = set()
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.add(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("transformers", "peft", "accelerate")]
    warning_once.cache_clear()
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        for logger in loggers:
            logger.addHandler(handler)
        yield found
        for logger in loggers:
            logger.removeHandler(handler)
    found |= {f"{warning.category.__name__}: {warning.message}" for warning in recorded}


def adapt_train_save_and_load(backbone: str, config: PeftConfig, folder: Path) -> set[str]:
    """The warnings of all that."""
    make, inputs = BACKBONES[backbone]
    make().save_pretrained(folder / "backbone")
    samples = [{**{name: value[index] for name, value in inputs.items()}, "labels": index % 2} for index in range(3)]
    with warned() as found:
        model = get_peft_model(type(make()).from_pretrained(folder / "backbone"), config)
        arguments = TrainingArguments(
            str(folder), max_steps=1, report_to=[], disable_tqdm=True, use_cpu=True, **{CHECKPOINTING: True}
        )
        trainer = Trainer(model, arguments, train_dataset=samples, eval_dataset=samples)
        trainer.train()
        trainer.evaluate()
        model.save_pretrained(folder / "adapter")
        loaded = PeftModel.from_pretrained(type(make()).from_pretrained(folder / "backbone"), folder / "adapter")
        loaded(**inputs, output_hidden_states=True, output_attentions=False)
    return found


@pytest.mark.parametrize("kind", [DEEP, SHALLOW], ids=["deep", "shallow"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_only_those_that_lora_gives(backbone: str, kind: dict[str, Any], tmp_path: Path) -> None:
    lora = LoraConfig(target_modules="all-linear", exclude_modules=["classifier"], modules_to_save=["classifier"])
    from_lora = adapt_train_save_and_load(backbone, lora, tmp_path / "lora")
    assert adapt_train_save_and_load(backbone, small_config(**kind), tmp_path / "e2vpt") <= from_lora
