from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
from transformers import SchedulerType, TrainingArguments

from e2vpt_peft import E2VPTConfig
from e2vpt_peft.trainer.settings import (
    HARMLESS,
    as_json,
    differences,
    settings_of_adapter,
    settings_of_arguments,
)

from .toy import arguments


def test_all_training_arguments_count_but_those_that_are_listed(tmp_path: Path) -> None:
    names = {field.name for field in fields(TrainingArguments)}
    counted = settings_of_arguments(arguments(tmp_path)).keys()
    assert names - counted <= HARMLESS | {"save_strategy", "save_steps"}
    assert not counted & HARMLESS
    assert {"warmup_steps", "optim", "bf16", "label_smoothing_factor", "eval_strategy", "adam_beta1"} <= counted


@pytest.mark.parametrize("best", [False, True])
def test_when_checkpoints_are_saved_counts_if_the_best_is_loaded(best: bool, tmp_path: Path) -> None:
    options = {"save_strategy": "epoch", "eval_strategy": "epoch", "load_best_model_at_end": best}
    assert ("save_strategy" in settings_of_arguments(arguments(tmp_path, **options))) == best


def test_all_fields_of_an_adapter_count_but_what_is_pruned_and_where_it_is_from() -> None:
    one, other = E2VPTConfig(), E2VPTConfig(token_mask=[True] * 9 + [False], base_model_name_or_path="x")
    assert settings_of_adapter(one) == settings_of_adapter(other)
    assert settings_of_adapter(E2VPTConfig(kv_prompt_dropout=0.5)) != settings_of_adapter(one)


def test_settings_are_compared_as_they_are_read_from_a_file() -> None:
    then = as_json({"a": {"kind": SchedulerType.COSINE, "names": {"y", "x"}, 3: (1, None)}})
    assert then == {"a": {"kind": "cosine", "names": ["x", "y"], "3": [1, None]}}
    now = as_json({"a": {"kind": SchedulerType.LINEAR, "names": {"x", "y"}}, "b": 1})
    assert differences(then, then) == []
    assert differences(now, then) == [
        "a.kind='linear' (it was 'cosine')",
        "b=1 (it was None)",
        "a.3=None (it was [1, None])",
    ]
