"""Checkpoints of Trainer: sealed when they are written, and looked at before one is resumed."""

from __future__ import annotations

import json
import logging
import os
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..utils.files import digest_of, read_checked, write_checked
from .processes import on_main_process

logger = logging.getLogger(__name__)

SEAL = "seal.json"
"""The checksums of all files of a checkpoint. It is written when they are complete."""

STATE = "trainer_state.json"
"""What Trainer writes last."""


@dataclass(frozen=True)
class Progress:
    """What a phase needs to go on from a checkpoint, beside what Trainer has written.

    Attributes:
        is_exact (`bool`): Whether Trainer goes on from it as if nothing had been.
        loss (`float`): The sum of the losses of all steps so far.
        callbacks (`list[dict[str, Any]]`): The attributes of each callback that counts.
        best (`str`, *optional*): The checkpoint whose weights may be taken at the end.
    """

    is_exact: bool
    loss: float
    callbacks: list[dict[str, Any]]
    best: str | None = None


def seal(checkpoint: Path, progress: Progress) -> None:
    """Record that a checkpoint is complete, with the checksums of its files."""
    files = {path.relative_to(checkpoint).as_posix(): _digest(path) for path in _files(checkpoint)}
    write_checked(checkpoint / SEAL, {"files": files, "progress": asdict(progress)})


def sealed_progress(checkpoint: Path) -> Progress | None:
    """The progress of a sealed checkpoint whose files are as they were written; damage is logged."""
    damaged = _damage_of_sealed(checkpoint)
    if damaged is None:
        return Progress(**read_checked(checkpoint / SEAL, ("files", "progress"))["progress"])
    if (checkpoint / SEAL).exists():  # otherwise the process was killed while it wrote it
        _log_damage(checkpoint, damaged)
    return None


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder, whole or not, by their numbers."""
    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rpartition("-")[2].isdecimal()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def last_whole_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The last checkpoint in a folder that is whole.

    A process that is killed, or a disk that is full, leaves a checkpoint of which files are missing or cut short, and
    [`~transformers.Trainer`] fails to resume from it. This is transformers' `get_last_checkpoint` without those. What
    is passed over is logged, and left where it is.

    Of JSON, safetensors and PyTorch's own files is found out whether they are complete, and of PyTorch's also whether
    their checksums hold. A bit that flips in the numbers of a safetensors file is only noticed in the checkpoints of
    [`E2VPTTrainer`], which have checksums of all files.

    Args:
        output_dir (`str` or `os.PathLike`): The folder with the checkpoints. It need not exist.

    Returns:
        `str`, *optional*: The path of the checkpoint, or `None` if there is none.

    Example:

        ```py
        >>> from e2vpt_peft.trainer import last_whole_checkpoint

        >>> trainer.train(resume_from_checkpoint=last_whole_checkpoint("out"))
        ```
    """

    def find() -> str | None:
        for checkpoint in reversed(checkpoints_in(Path(output_dir))):
            sealed = (checkpoint / SEAL).exists()
            damaged = _damage_of_sealed(checkpoint) if sealed else _damage_of_unsealed(checkpoint)
            if damaged is None:
                return str(checkpoint)
            _log_damage(checkpoint, damaged)
        return None

    return on_main_process(find)


def _damage_of_sealed(checkpoint: Path) -> Path | None:
    """The first file that is not what it was when the checkpoint was sealed."""
    try:
        files: dict[str, str] = read_checked(checkpoint / SEAL, ("files", "progress"))["files"]
    except (OSError, ValueError):
        return checkpoint / SEAL
    for name, digest in files.items():
        path = checkpoint / name
        if not path.is_file() or _digest(path) != digest:
            return path
    return None


def _damage_of_unsealed(checkpoint: Path) -> Path | None:
    """The first file that is missing or incomplete, as far as its format tells."""
    if not (checkpoint / STATE).exists():
        return checkpoint / STATE
    for path in _files(checkpoint):
        if path.suffix in _COMPLETE and not _COMPLETE[path.suffix](path):
            return path
    return None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except ValueError:
        return False
    return True


def _is_archive(path: Path) -> bool:
    """PyTorch's files are zip files, whose directory stands at the end, with a checksum of each part."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except (zipfile.BadZipFile, EOFError, NotImplementedError):  # the last: flags that a flipped bit has set
        return False


def _is_safetensors(path: Path) -> bool:
    """Its header has the lengths of all tensors, which are compared with that of the file."""
    try:
        with safe_open(path, framework="np"):
            return True
    except SafetensorError:
        return False


_COMPLETE: dict[str, Callable[[Path], bool]] = {
    ".json": _is_json,
    ".safetensors": _is_safetensors,
    **dict.fromkeys((".pt", ".pth", ".bin"), _is_archive),
}
"""Whether a file is complete, by the end of its name."""


def _files(checkpoint: Path) -> list[Path]:
    return [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != SEAL]


def _digest(path: Path) -> str:
    return digest_of(path.read_bytes())


def _log_damage(checkpoint: Path, damaged: Path) -> None:
    logger.warning("%s is passed over: %s is missing or damaged.", checkpoint, damaged)
