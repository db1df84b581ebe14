"""What a search has done so far, on disk, so that it can be killed at any moment and goes on from there."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors.torch import load, save
from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..config import E2VPTConfig
from ..utils.files import write_atomically
from .config import Metric, PruningConfig

FOLDER, RECORDS = "_pruning_state", "state.json"
"""Trainer does not push what begins with an underscore."""

# What results depend on, with the PruningConfig: a search is resumed with the same ones only.
ARGUMENTS = (
    "seed",
    "data_seed",
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "weight_decay",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
)
ADAPTER_SETTINGS = (
    "num_visual_prompts",
    "visual_prompt_depth",
    "num_kv_prompts",
    "share_kv_prompts",
    "init_weights",
    "num_segments",
)

T = TypeVar("T")


def on_main_process(make: Callable[[], T]) -> T:
    """What `make` returns on the main process, on all processes; so is the error that it raises.

    All that is read from disk and all that decides comes this way, so that processes never part.
    """
    if PartialState().num_processes == 1:
        return make()
    made: list[T | Exception | None] = [None]
    if PartialState().is_main_process:
        try:
            made[0] = make()
        except Exception as error:
            made[0] = error
    broadcast_object_list(made)
    if isinstance(made[0], Exception):
        raise made[0]
    return cast(T, made[0])


def settings_of(
    arguments: TrainingArguments, adapter: E2VPTConfig, config: PruningConfig, metric: Metric, final_training: bool
) -> dict[str, Any]:
    """The settings of a search, all of which its results depend on."""
    return {
        **{name: getattr(arguments, name) for name in ARGUMENTS},
        **{name: getattr(adapter, name) for name in ADAPTER_SETTINGS},
        **asdict(config),
        "metric_for_best_model": metric.name,
        "greater_is_better": metric.greater_is_better,
        "final_training": final_training,
    }


class SearchState:
    """The folder `_pruning_state` in the output directory.

    `state.json` holds the settings and one record per finished phase; each record is written after the tensors that
    belong to it. Each phase has a folder in which Trainer keeps its checkpoints until the phase is finished.

    Args:
        output_dir (`str`): The output directory.
        settings (`Mapping[str, Any]`): What the results depend on; a search is resumed only with the same ones.
        resume (`bool`): Go on with the search that is there.

    Raises:
        ValueError: The search that is there had other settings.
        FileExistsError: The folder is there, but holds something else.
    """

    def __init__(self, output_dir: str, settings: Mapping[str, Any], resume: bool) -> None:
        self.folder = Path(output_dir) / FOLDER
        self.settings = json.loads(json.dumps(settings))
        self.records: dict[str, dict[str, Any]] = on_main_process(lambda: self._open(resume))

    @staticmethod
    def exists(output_dir: str) -> bool:
        """Whether there is a search to resume."""
        return on_main_process((Path(output_dir) / FOLDER / RECORDS).is_file)

    def _open(self, resume: bool) -> dict[str, dict[str, Any]]:
        path = self.folder / RECORDS
        if path.is_file() and resume:
            content = json.loads(path.read_text())
            for name, value in self.settings.items():
                if content["settings"].get(name) != value:
                    raise ValueError(
                        f"{name}={value!r}, but the search in {self.folder} was started with "
                        f"{content['settings'].get(name)!r}: resume it with that, or choose another output_dir."
                    )
            return dict(content["records"])
        if path.is_file():  # of another search: kept once, in case that was no intention
            backup = self.folder.with_name(f"{FOLDER}.bak")
            if (backup / RECORDS).is_file():
                shutil.rmtree(backup)
            self.folder.rename(backup)
        elif self.folder.exists() and any(not file.name.endswith(".tmp") for file in self.folder.iterdir()):
            raise FileExistsError(
                f"{self.folder} is needed for the state of the search, but holds something else: choose another "
                "output_dir, or move it away."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write({})
        return {}

    def finish(self, phase: str, record: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Record that a phase is finished, with the tensors that it made, and remove its checkpoints."""

        def write() -> dict[str, Any]:
            write_atomically(self._tensors(phase), save(dict(tensors)))
            self._write({**self.records, phase: record})
            self._remove_checkpoints(phase)
            return dict(record)

        self.records[phase] = on_main_process(write)

    def tensors(self, phase: str) -> dict[str, torch.Tensor]:
        """The tensors of a finished phase."""
        return on_main_process(lambda: load(self._tensors(phase).read_bytes()))

    def phase_folder(self, phase: str) -> Path:
        return self.folder / phase

    def last_checkpoint(self, phase: str) -> str | None:
        """The last whole checkpoint that Trainer has saved of an unfinished phase; removes half-written ones."""

        def find() -> str | None:
            checkpoints = self._checkpoints(phase)
            while checkpoints and not _is_whole(checkpoints[-1]):
                shutil.rmtree(checkpoints.pop())
            return str(checkpoints[-1]) if checkpoints else None

        return on_main_process(find)

    def _tensors(self, phase: str) -> Path:
        return self.folder / f"{phase}.safetensors"

    def _write(self, records: Mapping[str, Any]) -> None:
        content = json.dumps({"settings": self.settings, "records": records}, indent=2)
        write_atomically(self.folder / RECORDS, content.encode())

    def _checkpoints(self, phase: str) -> list[Path]:
        found = self.phase_folder(phase).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))

    def _remove_checkpoints(self, phase: str) -> None:
        for checkpoint in self._checkpoints(phase):
            shutil.rmtree(checkpoint, ignore_errors=True)


def _is_whole(checkpoint: Path) -> bool:
    """Whether Trainer can resume from a checkpoint exactly. It writes `trainer_state.json` last."""
    processes = PartialState().num_processes
    random_states = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    needed = ["scheduler.pt", *random_states]
    if not (checkpoint / "latest").exists():  # DeepSpeed's, where the main process waits for the others
        needed += ["optimizer.bin" if (checkpoint / "optimizer.bin").exists() else "optimizer.pt"]  # FSDP's, or not
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    # The other processes may be killed while they write theirs: the directory of a zip file stands at its end.
    return all(zipfile.is_zipfile(checkpoint / name) for name in needed)
