"""One search at a time in an output directory."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from .processes import on_main_process

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

LOCK = "_pruning_lock"
"""Trainer does not push what begins with an underscore."""

_HELD: set[Path] = set()
"""By this process, which gets any lock twice."""


@contextmanager
def locked(output_dir: str) -> Iterator[None]:
    """Keep other searches out of an output directory.

    The main process holds a lock of the operating system (`fcntl.lockf`) on a file, which ends with the process,
    however it ends; what it leaves keeps nobody out. Forked processes, such as workers of data loaders, do not inherit
    it. It holds between hosts as well if the network file system has locks, as NFS does with its lock service. Where
    there are none, that is logged, and nobody is kept out.

    Args:
        output_dir (`str`): The output directory. It is made if it is not there.

    Raises:
        RuntimeError: Another search runs there. The message has its process and its host.
    """
    path = Path(output_dir).resolve() / LOCK
    files: list[IO[str]] = []  # of the main process
    on_main_process(lambda: files.extend(_acquire(path)))
    try:
        yield
    finally:
        for file in files:  # no other process waits at the file: one that has opened it finds that it is gone
            path.unlink(missing_ok=True)
            file.close()
            _HELD.discard(path)


def _acquire(path: Path) -> list[IO[str]]:
    """The open file that holds the lock, or none where there are no locks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path in _HELD:
        raise _occupied(path, path.read_text())
    while True:
        file = path.open("a+")
        try:
            if fcntl is None:
                raise OSError("this operating system has no fcntl")
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            owner = file.read()
            file.close()
            raise _occupied(path, owner) from None
        except OSError as error:
            file.close()
            path.unlink(missing_ok=True)
            logger.warning("%s cannot be locked (%s): run no other search there at the same time.", path.parent, error)
            return []
        if _is_at(path, file):
            break
        file.close()  # its owner has removed it meanwhile
    file.truncate(0)
    file.write(json.dumps({"process": os.getpid(), "host": socket.gethostname(), "since": time.ctime()}))
    file.flush()
    _HELD.add(path)
    return [file]


def _is_at(path: Path, file: IO[str]) -> bool:
    """Whether a path is that of an open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _occupied(path: Path, owner: str) -> RuntimeError:
    try:
        known = "process {process} on {host} since {since}".format(**json.loads(owner))
    except ValueError:  # it is about to write that
        known = "another process"
    return RuntimeError(
        f"A search runs in {path.parent}: {known}. Wait until it has ended, stop it, or choose another output_dir."
    )
