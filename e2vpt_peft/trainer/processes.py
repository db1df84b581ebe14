"""What one process decides for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

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
