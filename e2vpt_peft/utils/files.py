"""Files that are whole whenever they have their name, whatever happens to the process or the disk meanwhile."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

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
