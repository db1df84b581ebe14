"""What the results of a search depend on: it is resumed with the same only."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any

from transformers import TrainingArguments

from ..config import E2VPTConfig

HARMLESS = frozenset(
    """
    output_dir run_name project report_to trackio_space_id trackio_bucket_id trackio_static_space_id logging_dir
    logging_strategy logging_steps logging_first_step logging_nan_inf_filter log_level log_level_replica
    log_on_each_node disable_tqdm include_num_input_tokens_seen skip_memory_metrics debug push_to_hub
    hub_model_id hub_strategy hub_token hub_private_repo hub_always_push hub_revision save_total_limit
    save_on_each_node save_only_model enable_jit_checkpoint ignore_data_skip resume_from_checkpoint
    restore_callback_states_from_checkpoint do_train do_eval do_predict local_rank ddp_timeout
    dataloader_pin_memory dataloader_prefetch_factor dataloader_multiprocessing_context torch_empty_cache_steps
    """.split()  # noqa: SIM905  (a line for each would be long)
)
"""Training arguments on which no result depends: where files go, what is logged and pushed; how checkpoints are kept
and resumed; what a search does not read, or what changes its speed alone."""

OF_CHECKPOINTS = frozenset({"save_strategy", "save_steps"})
"""Harmless as well, unless the best checkpoint is loaded at the end."""

NO_SETTINGS = frozenset(
    """
    token_mask segment_mask backbone inference_mode base_model_name_or_path revision peft_version auto_mapping
    """.split()  # noqa: SIM905  (a line for each would be long)
)
"""Fields of an adapter's configuration that are no settings: masks, which the state of a search has, and where the
adapter comes from."""


def settings_of_arguments(arguments: TrainingArguments) -> dict[str, Any]:
    """All training arguments but those that do no harm."""
    harmless = HARMLESS if arguments.load_best_model_at_end else HARMLESS | OF_CHECKPOINTS
    return {name: value for name, value in arguments.to_dict().items() if name not in harmless}


def settings_of_adapter(config: E2VPTConfig) -> dict[str, Any]:
    """All fields of an adapter's configuration that are settings."""
    return {name: value for name, value in config.to_dict().items() if name not in NO_SETTINGS}


def as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they are when they are read from a file."""
    return dict(json.loads(json.dumps(settings, default=_plain)))


def _plain(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    return value.value if isinstance(value, Enum) else str(value)


def differences(now: Mapping[str, Any], then: Mapping[str, Any]) -> list[str]:
    """In which settings a search differs from one that was started, each with both values."""
    values, others = dict(_flat(now)), dict(_flat(then))
    names = [name for name in {**values, **others} if values.get(name) != others.get(name)]
    return [f"{name}={values.get(name)!r} (it was {others.get(name)!r})" for name in names]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
