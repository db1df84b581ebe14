"""A process that works with the local Hub.

huggingface_hub reads `HF_ENDPOINT`, `HF_HUB_OFFLINE` and the place of its cache when it is imported and hands them on
as defaults; the tests' own process has imported it offline. So what goes to the Hub runs in a process with an
environment of its own, started once for all tests, because importing torch and transformers takes seconds.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any


class HubClient:
    """Runs functions in a process whose Hub is the given one.

    Args:
        endpoint (`str`): The Hub's address.
        home (`Path`): For its cache.
    """

    def __init__(self, endpoint: str, home: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, context, _start, (environment(endpoint, home),))

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function of a test module there, and return what it returns, or raise what it raises."""
        return self._pool.submit(_call, function, args, kwargs).result(timeout=300)

    def close(self) -> None:
        self._pool.shutdown()


class RaisedInClient(Exception):
    """An error of the client; errors of huggingface_hub themselves do not travel between processes."""


def environment(endpoint: str, home: Path) -> dict[str, str]:
    """The environment of a process that works with a Hub, on behalf of nobody."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return {
        **kept,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",  # huggingface_hub uploads through Xet whenever it is installed
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1,localhost",
    }


def _start(environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)


def _call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        return function(*args, **kwargs)
    except Exception as error:
        causes = [error]
        while causes[-1].__cause__ is not None:
            causes.append(causes[-1].__cause__)  # type: ignore[arg-type]
        raise RaisedInClient("\n".join(f"{type(cause).__name__}: {cause}" for cause in causes)) from None
