"""What the examples show on a terminal: their own lines, and not the notices of libraries. To be imported first."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any

for library in ("bitsandbytes", "datasets", "torch.utils._pytree", "torchao"):
    # Some of their notices appear as soon as peft imports them.
    logging.getLogger(library).setLevel(logging.ERROR)


class InputError(ValueError):
    """What was given cannot be used; the message says what to change."""


def warn(message: str) -> None:
    """Tell of something that is allowed, but probably not meant."""
    print(f"warning: {message}", file=sys.stderr)


def hide_notices() -> None:
    """Leave out what libraries report about new heads, bars of files and names that they will change.

    Warnings of other kinds, and those of `e2vpt_peft`, are still shown.
    """
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)  # of peft's use of transformers


def run(main: Callable[[], Any]) -> None:
    """Run a script; wrong input ends it with a sentence instead of a traceback."""
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
