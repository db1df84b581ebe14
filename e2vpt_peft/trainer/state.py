"""What a search has done so far, on disk, so that it can be killed at any moment and goes on from there."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from ..utils.files import digest_of, read_checked, write_atomically, write_checked
from .checkpoints import Progress, checkpoints_in, sealed_progress
from .processes import on_main_process
from .settings import as_json, differences

logger = logging.getLogger(__name__)

FOLDER, RECORDS = "_pruning_state", "state.json"
"""Trainer does not push what begins with an underscore."""

INITIAL, START = "initial", "start"
"""Where the search started: what no phase can make again."""

DIGEST = "digest"
"""In each record, of the tensors that belong to it."""


class SearchState:
    """The folder `_pruning_state` in the output directory.

    `state.json` holds the settings and one record per finished phase; each record is written after the tensors that
    belong to it, and has their checksum. Each phase has a folder in which Trainer keeps its checkpoints until the
    phase is finished.

    A phase whose tensors are missing or damaged is as good as not finished: that is logged when the search is resumed,
    and it is done again, with the same result.

    Args:
        output_dir (`str`): The output directory.
        settings (`Mapping[str, Any]`): What the results depend on; a search is resumed only with the same ones.
        resume (`bool`): Go on with the search that is there.

    Raises:
        ValueError: The search that is there had other settings, or what it started from is damaged.
        FileExistsError: The folder is there, but holds something else.
    """

    def __init__(self, output_dir: str, settings: Mapping[str, Any], resume: bool) -> None:
        self.folder = Path(output_dir) / FOLDER
        self.settings = as_json(settings)
        self._digests: dict[str, str] = {}  # on the main process
        self.records: dict[str, dict[str, Any]] = on_main_process(lambda: self._open(resume))

    @staticmethod
    def exists(output_dir: str) -> bool:
        """Whether there is a search to resume."""
        return on_main_process((Path(output_dir) / FOLDER / RECORDS).is_file)

    def _open(self, resume: bool) -> dict[str, dict[str, Any]]:
        path = self.folder / RECORDS
        if path.is_file() and resume:
            return self._read()
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

    def _read(self) -> dict[str, dict[str, Any]]:
        """The records of the search that is there, if it is this one."""
        try:
            content = read_checked(self.folder / RECORDS, ("settings", "records"))
        except ValueError as error:
            raise ValueError(
                f"{error} The search cannot be resumed. Put a copy of the file there, or start anew without "
                "resume_from_checkpoint."
            ) from None
        changed = differences(self.settings, content["settings"])
        if changed:
            raise ValueError(
                f"The search in {self.folder} was started with other settings: {', '.join(changed)}. Resume it with "
                "those, or choose another output_dir."
            )
        records: dict[str, dict[str, Any]] = content["records"]
        self._digests = {phase: record.pop(DIGEST, "") for phase, record in records.items()}
        for phase in list(records):
            try:
                self._load(phase)
            except ValueError as error:
                if phase in (INITIAL, START):
                    raise
                logger.warning("%s Phase '%s' is done again.", error, phase)
                del records[phase]
        return records

    def finish(self, phase: str, record: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Record that a phase is finished, with the tensors that it made, and remove its checkpoints."""

        def write() -> dict[str, Any]:
            content = save(dict(tensors))
            write_atomically(self._tensors(phase), content)
            self._digests[phase] = digest_of(content)
            self._write({**self.records, phase: record})
            self._remove_checkpoints(phase)
            return dict(record)

        self.records[phase] = on_main_process(write)

    def tensors(self, phase: str) -> dict[str, torch.Tensor]:
        """The tensors of a finished phase.

        Raises:
            ValueError: Their file is missing or damaged, or another process has written it.
        """
        return on_main_process(lambda: load(self._load(phase)))

    def _load(self, phase: str) -> bytes:
        path = self._tensors(phase)
        content = path.read_bytes() if path.is_file() else b""
        if digest_of(content) != self._digests[phase]:
            raise ValueError(f"{path} is missing or damaged: its checksum is not the one in {RECORDS}.")
        return content

    def phase_folder(self, phase: str) -> Path:
        return self.folder / phase

    def last_checkpoint(self, phase: str) -> tuple[str, Progress] | None:
        """The last checkpoint from which an unfinished phase goes on exactly; removes those behind it."""

        def find() -> tuple[str, Progress] | None:
            checkpoints = checkpoints_in(self.phase_folder(phase))
            while checkpoints:
                progress = sealed_progress(checkpoints[-1])
                if progress is not None and progress.is_exact and self._has_best(phase, progress):
                    return str(checkpoints[-1]), progress
                shutil.rmtree(checkpoints.pop())
            return None

        return on_main_process(find)

    def _has_best(self, phase: str, progress: Progress) -> bool:
        """Whether the checkpoint whose weights may be taken at the end is whole."""
        return progress.best is None or sealed_progress(self.phase_folder(phase) / progress.best) is not None

    def _tensors(self, phase: str) -> Path:
        return self.folder / f"{phase}.safetensors"

    def _write(self, records: Mapping[str, Mapping[str, Any]]) -> None:
        with_digests = {phase: {**record, DIGEST: self._digests[phase]} for phase, record in records.items()}
        write_checked(self.folder / RECORDS, {"settings": self.settings, "records": with_digests})

    def _remove_checkpoints(self, phase: str) -> None:
        for checkpoint in checkpoints_in(self.phase_folder(phase)):
            shutil.rmtree(checkpoint, ignore_errors=True)
