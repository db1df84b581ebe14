"""FSDP and DeepSpeed, which take a model apart and cannot change its parameters."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.utils import compare_versions
from transformers.trainer_utils import SaveStrategy

from ..adapter import PromptedAdapter
from ..pruning.snapshot import copy_trained

FSDP, DEEPSPEED = "is_fsdp_enabled", "is_deepspeed_enabled"
"""The attributes by which Trainer asks whether its model is in shards."""


class Engines:
    """The engines of a Trainer, which it has while it trains only.

    Pruning makes parameters of other sizes, and no engine can change those that it has. So the Trainer has the whole
    model and no engine, but in [`sharded_copy`].

    Args:
        trainer (`Trainer`): The Trainer. Its engines are taken from it.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.found = [name for name in (FSDP, DEEPSPEED) if getattr(trainer, name)]
        self._switch(on=False)

    def check_settings(self) -> None:
        """Refuse settings with which no search can work.

        Raises:
            ValueError: FSDP or DeepSpeed has some. Nothing has been done.
        """
        state = self.trainer.accelerator.state
        if FSDP in self.found:
            plugin = state.fsdp_plugin
            full_state_dict = "FULL" in str(plugin.state_dict_type)
            if plugin.fsdp_version != 2 or not full_state_dict or plugin.cpu_ram_efficient_loading:
                raise ValueError(
                    "E2VPTTrainer needs FSDP with fsdp_version: 2, fsdp_state_dict_type: FULL_STATE_DICT and "
                    "fsdp_cpu_ram_efficient_loading: false, as in examples/accelerate/fsdp2.yaml."
                )
            # Older ones read an adapter on the first process only, without a word, or end in an error.
            if self.trainer.args.save_strategy != SaveStrategy.NO and compare_versions("accelerate", "<", "1.15"):
                raise ValueError(
                    "accelerate before 1.15 cannot load adapters (LoRA's included) from checkpoints of FSDP: update "
                    "it, or set TrainingArguments(save_strategy='no'). An interrupted search repeats the training "
                    "that was running."
                )
        if DEEPSPEED in self.found and "scheduler" in state.deepspeed_plugin.deepspeed_config:
            raise ValueError(
                "E2VPTTrainer has trainings of different lengths, for which DeepSpeed's scheduler is not made anew: "
                "take 'scheduler' out of the DeepSpeed config, and use TrainingArguments(lr_scheduler_type=...)."
            )

    @contextmanager
    def sharded_copy(self, adapter: PromptedAdapter) -> Iterator[None]:
        """Within, the Trainer has an engine and a copy of the model for it, if it has one at all.

        What the copy has learned comes back into the adapter, unless there was an error.
        """
        if not self.found:
            yield
            return
        trainer, whole = self.trainer, adapter.model
        trainer.model = trainer.model_wrapped = copy.deepcopy(whole.cpu())
        self._switch(on=True)
        try:
            yield
            copy_trained(trainer.model, adapter)
        finally:
            self._switch(on=False)
            trainer.accelerator.free_memory()  # DeepSpeed's engine, too
            trainer.deepspeed = trainer.optimizer = trainer.lr_scheduler = None
            trainer.model = trainer.model_wrapped = trainer.callback_handler.model = whole

    def place_whole_model(self) -> None:
        """Put the whole model on the device. Trainer leaves that to the engine, if there is one."""
        if self.found and not any(getattr(self.trainer, name) for name in self.found):
            self.trainer.model.to(self.trainer.args.device)

    def _switch(self, on: bool) -> None:
        for name in self.found:
            setattr(self.trainer, name, on)
