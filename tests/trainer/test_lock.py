from __future__ import annotations

import errno
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from e2vpt_peft.trainer import lock
from e2vpt_peft.trainer.lock import LOCK, locked

from .test_trainer import Trainings
from .toy import make_trainer

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")


@pytest.fixture
def other(tmp_path: Path) -> Iterator[int]:
    """A process that holds the lock of the folder."""
    process = os.fork()
    if process == 0:
        with locked(str(tmp_path)):
            (tmp_path / "ready").touch()
            time.sleep(60)
        os._exit(0)
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    (tmp_path / "ready").unlink()
    yield process
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def test_a_search_is_kept_out_while_another_process_runs_one(tmp_path: Path, other: int) -> None:
    trainings = Trainings()
    for resume in (False, True):
        with pytest.raises(RuntimeError, match=f"process {other} on {socket.gethostname()}.*another output_dir"):
            make_trainer(tmp_path, callbacks=[trainings]).train(resume_from_checkpoint=resume)
    assert trainings.folders == []
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]
    with locked(str(tmp_path / "elsewhere")):
        pass


def test_what_a_killed_process_leaves_keeps_nobody_out(tmp_path: Path) -> None:
    process = os.fork()
    if process == 0:
        lock._acquire(tmp_path / LOCK)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(process, 0)
    assert (tmp_path / LOCK).exists()
    with locked(str(tmp_path)):
        assert f'"process": {os.getpid()}' in (tmp_path / LOCK).read_text()


def test_a_forked_worker_does_not_hold_it(tmp_path: Path) -> None:
    with locked(str(tmp_path)):
        worker = os.fork()
        if worker == 0:
            time.sleep(60)
    try:
        with locked(str(tmp_path)):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)


def test_one_process_gets_it_once_and_again_when_it_is_free(tmp_path: Path) -> None:
    with locked(str(tmp_path)), pytest.raises(RuntimeError, match=str(os.getpid())), locked(str(tmp_path)):
        pass
    with pytest.raises(ZeroDivisionError), locked(str(tmp_path)):
        raise ZeroDivisionError
    with locked(str(tmp_path)):
        assert (tmp_path / LOCK).exists()
    assert not (tmp_path / LOCK).exists()


def test_where_there_are_no_locks_that_is_logged(tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    def lockf(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", lockf)
    with locked(str(tmp_path)):
        assert "cannot be locked" in caplog.text and "no locks available" in caplog.text
    assert not list(tmp_path.iterdir())
