"""A Trainer whose adapters have a model card."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from torch import nn
from transformers import Trainer
from transformers.modelcard import extract_hyperparameters_from_trainer
from transformers.trainer_utils import HubStrategy

from ..adapter import active_adapters
from ..model_card.readme import has_persons_words
from ..model_card.write import README, download_card, read_card, write_model_card


class ModelCardTrainer(Trainer):
    """transformers' [`~transformers.Trainer`], but for the model card that it writes with an E²VPT adapter.

    Wherever an adapter is saved or pushed, its card says what [`write_model_card`] says, and what the Trainer knows:
    data set, results and training arguments. The results are those of the weights that are saved. A card that a person
    wrote is never overwritten, neither in the output directory nor on the Hub.

    Example:

        ```py
        >>> trainer = ModelCardTrainer(model=model, args=TrainingArguments("out", push_to_hub=True), ...)
        >>> trainer.train()
        >>> trainer.evaluate()
        >>> trainer.push_to_hub(dataset="uoft-cs/cifar100")
        ```
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._given_details: dict[str, Any] = {}
        self._push_target: dict[str, Any] | None = None

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        **details: Any,
    ) -> None:
        """Write the model card into the output directory. Cards that are written later keep what is given here.

        Args:
            language, license, tags, model_name: As for [`~transformers.Trainer.create_model_card`].
            finetuned_from (`str`, *optional*): The backbone. Defaults to where it was loaded from.
            tasks (`str`, *optional*): The Hub's name of the task. Defaults to that of the backbone's class.
            dataset_tags, dataset (`str`, *optional*):
                The training data, a Hub id or any other name. Defaults to that of the training data set, if it comes
                from the Hub.
            dataset_args (`str`, *optional*): The configuration of a Hub data set.
            **details: What else the card should say, see [`CardDetails`].
        """
        if not active_adapters(self._adapted_model()):
            super().create_model_card(
                language, license, tags, model_name, finetuned_from, tasks, dataset_tags, dataset, dataset_args
            )
        elif self.is_world_process_zero():
            given = {
                "language": language,
                "license": license,
                "tags": [tags] if isinstance(tags, str) else tags,
                "name": model_name,
                "base_model": finetuned_from,
                "task": _first(tasks),
                "dataset": _first(dataset_tags) or _first(dataset),
                "dataset_config": _first(dataset_args),
                **details,
            }
            given = {name: value for name, value in given.items() if value is not None}
            self._given_details = {**self._given_details, **given}
            self._write_card(Path(str(self.args.output_dir)))

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo:
        """As [`~transformers.Trainer.push_to_hub`]; further arguments go to [`create_model_card`]."""
        self._push_target = {"token": token or self.args.hub_token, "revision": revision or self.args.hub_revision}
        if private is not None:
            kwargs["private"] = private
        try:
            return super().push_to_hub(commit_message, blocking, token, revision, **kwargs)
        finally:
            self._push_target = None

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        pushes = self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END
        if pushes and active_adapters(self._adapted_model()):
            self._push_target = {"token": self.args.hub_token, "revision": self.args.hub_revision}
            self._write_card(Path(str(self.args.output_dir)))
            self._push_target = None
        super()._push_from_checkpoint(checkpoint_folder)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(str(self.args.output_dir if output_dir is None else output_dir))
        path = folder / README
        before = path.read_bytes() if path.exists() else None
        super()._save(output_dir, state_dict)
        if self.args.should_save and active_adapters(self._adapted_model()):
            # PEFT writes a form, or changes tags and text of the card that is there.
            if before is None:
                path.unlink(missing_ok=True)
            else:
                path.write_bytes(before)
            self._write_card(folder)

    def _write_card(self, folder: Path) -> None:
        if self._push_target is not None:
            self._fetch_card(folder / README)
        adapter_id = self.hub_model_id or str(self.args.output_dir)
        dataset, configuration = _hub_dataset(self.train_dataset)
        details = {
            "adapter_id": adapter_id,
            "processor_id": None if self.processing_class is None else adapter_id,
            "dataset": dataset,
            "dataset_config": configuration,
            "metrics": self._card_metrics(),
            "arguments": extract_hyperparameters_from_trainer(self),
            "pruning": self._card_pruning(),
        }
        write_model_card(self._adapted_model(), folder, **{**details, **self._given_details})

    def _fetch_card(self, path: Path) -> None:
        """Start from the card on the Hub, which a person may have changed, unless a person changed the one here."""
        if not has_persons_words(read_card(path)):
            pushed = download_card(str(self.hub_model_id), **self._push_target or {})
            if pushed is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(pushed.encode())

    def _card_metrics(self) -> dict[str, float]:
        """The results of the weights that the model has now."""
        state, history = self.state, self.state.log_history
        end = max((index for index, entry in enumerate(history) if "train_runtime" in entry), default=None)
        step = state.global_step
        if end is not None and self.args.load_best_model_at_end and state.best_global_step:
            step = state.best_global_step
        while_training = [entry for entry in history[:end] if entry.get("step") == step]
        return results_in(while_training + (history[end:] if end is not None else []))

    def _card_pruning(self) -> str | None:
        """How it was found out which prompts to prune."""
        return None

    def _adapted_model(self) -> nn.Module:
        model: nn.Module = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return model


def results_in(entries: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The results of evaluations in a Trainer's history, the latest of each kind."""
    return {key: value for entry in entries for key, value in entry.items() if key.startswith(("eval_", "test_"))}


def _hub_dataset(dataset: Any) -> tuple[str | None, str | None]:
    """The Hub id and the configuration of a data set of the `datasets` library, if it was downloaded from there."""
    info = getattr(dataset, "info", None)  # other data sets have none
    for url in getattr(info, "download_checksums", None) or {}:
        if found := re.match(r"hf://datasets/([^@]+)@", url):
            return found[1], info.config_name  # type: ignore[union-attr]
    return None, None


def _first(names: str | list[str] | None) -> str | None:
    return names[0] if isinstance(names, list) and names else names or None  # type: ignore[return-value]
