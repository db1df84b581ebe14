"""Processes that are forked, to be killed: importing takes longer than what they do."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable
from typing import Any

import torch

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def child(work: Callable[[], None]) -> int:
    """Start a process that does this and ends."""
    # A signal that comes before the child is ready for it would take the child through the code of its parent.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    process = os.fork()
    if process == 0:
        interrupted = []

        def interrupt(*_: Any) -> None:
            interrupted.append(True)
            raise KeyboardInterrupt

        signal.signal(signal.SIGINT, interrupt)
        errors = os.fdopen(os.dup(2), "w")
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            torch.set_num_threads(1)
            work()
            os._exit(0)
        except BaseException:
            if interrupted:  # libraries in C make other errors of it (safetensors: a ValueError)
                os._exit(128 + signal.SIGINT)
            traceback.print_exc(file=errors)
            errors.flush()
            os._exit(1)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    return process


def ended(process: int) -> bool:
    """Wait for a child; whether it came to its end. It must not fail."""
    _, status = os.waitpid(process, 0)
    stopped = os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 128 + signal.SIGINT
    assert stopped or os.WEXITSTATUS(status) == 0, "the child failed"
    return not stopped
