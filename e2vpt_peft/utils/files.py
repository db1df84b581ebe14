"""Files that are whole whenever they have their name, whatever happens to the process or the disk meanwhile."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SAVING = "_saving"
"""The folder in which files are written. Trainer does not push what begins with an underscore."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a process that is killed meanwhile, sees the old or the new one whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError:  # a full disk needs the room
        temporary.unlink(missing_ok=True)
        raise


CHECKSUM = "checksum"


def digest_of(content: bytes) -> str:
    """A short checksum, which no damage leaves as it was."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def write_checked(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON with a checksum of its own, as [`write_atomically`] does."""
    checksum = digest_of(json.dumps(content).encode())
    write_atomically(path, json.dumps({**content, CHECKSUM: checksum}, indent=2).encode())


def read_checked(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """Read what [`write_checked`] has written.

    Args:
        path (`Path`): The file.
        names (`Sequence[str]`): What is in it, no more and no less. The checksum may be missing.

    Raises:
        ValueError: The file is damaged. The message names it.
    """
    try:
        content = json.loads(path.read_bytes())
        checksum = content.pop(CHECKSUM, None)
        damaged = content.keys() != set(names) or checksum not in (None, digest_of(json.dumps(content).encode()))
    except (ValueError, AttributeError):  # no JSON, or no dictionary
        damaged = True
    if damaged:
        raise ValueError(f"{path} is damaged: it is cut short, or its checksum is not that of its content.")
    return dict(content)


@contextmanager
def whole_files(folder: Path, known: Sequence[str] = ()) -> Iterator[Path]:
    """A folder to write into, whose files go to `folder` when all are written.

    If that fails, `folder` has what it had.

    Args:
        folder (`Path`): Where the files go. It is made if it is not there.
        known (`Sequence[str]`): Files of `folder` that who writes has to see.
    """
    temporary = folder / SAVING
    if temporary.exists():  # of a process that was killed
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    try:
        for name in known:
            if (folder / name).exists():
                shutil.copy(folder / name, temporary / name)
        yield temporary
        for path in sorted(temporary.rglob("*")):
            target = folder / path.relative_to(temporary)
            if path.is_dir():
                target.mkdir(exist_ok=True)
            else:
                os.replace(path, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
