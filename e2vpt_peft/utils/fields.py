"""Checks of the fields of configurations, whose messages name the field, its value and what is allowed."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

MAX_NAMES = 1_000
"""How many modules may be named: each is compared with every module of a model, and endings of names will do."""
SPECIAL = frozenset(r"\^$*+?{}[]|()")
"""What has a meaning in regular expressions. The dot has one, too, but is harmless in names, of which it is a part."""


def check_integer(name: str, value: Any, at_least: int, optional: bool = False) -> None:
    """Refuse what is no integer of at least that size."""
    if optional and value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}={value!r} must be an integer, {at_least} or more.")
    if value < at_least:
        raise ValueError(f"{name}={value!r} must be {at_least} or more.")


def is_number(value: Any) -> bool:
    """Whether a value is an integer or a floating-point number, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_positive(name: str, value: Any, or_zero: bool = False) -> None:
    """Refuse what is no finite number above 0; `or_zero` allows 0 as well."""
    allowed = "0 or more" if or_zero else "above 0"
    if not is_number(value):
        raise TypeError(f"{name}={value!r} must be a number, {allowed}.")
    if not (0 < value < math.inf or (or_zero and value == 0)):
        raise ValueError(f"{name}={value!r} must be {allowed}, and finite.")


def check_probability(name: str, value: Any) -> None:
    """Refuse what is no probability of dropout."""
    if not is_number(value):
        raise TypeError(f"{name}={value!r} must be a number in [0, 1).")
    if not 0 <= value < 1:
        raise ValueError(f"{name}={value!r} must be in [0, 1): 0 for no dropout, below 1 so that something is left.")


def check_type(name: str, value: Any, kind: type, words: str, optional: bool = False) -> None:
    """Refuse what is of another type; `words` say what it should be."""
    if not (isinstance(value, kind) or (optional and value is None)):
        raise TypeError(f"{name}={value!r} must be {words}{' or None' if optional else ''}.")


def check_choice(name: str, value: Any, allowed: Sequence[str | None]) -> None:
    """Refuse what is none of the allowed words."""
    if value not in allowed:
        words = " or ".join(map(repr, allowed)) if len(allowed) == 2 else f"one of {', '.join(map(repr, allowed))}"
        raise ValueError(f"{name}={value!r} must be {words}.")


def check_module_names(name: str, value: Any, or_pattern: bool = False, literal: bool = False) -> None:
    """Refuse what is no collection of names of modules, nor, where that will do, a regular expression.

    Args:
        name (`str`): The field.
        value: Its value.
        or_pattern (`bool`): Whether a regular expression will do.
        literal (`bool`):
            Whether names may have no character that means something else in a regular expression, but for the dot.
    """
    if value is None:
        return
    if isinstance(value, str) and or_pattern:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"{name}={value!r} is no regular expression: {error}.") from None
        return
    if not isinstance(value, (list, tuple, set)) or not all(isinstance(one, str) and one for one in value):
        pattern = ", or a regular expression" if or_pattern else ""
        raise TypeError(f"{name}={value!r} must be a list of names{pattern}, or None.")
    if len(value) > MAX_NAMES:
        raise ValueError(f"{name} has {len(value)} names, but may have {MAX_NAMES}: endings of names will do.")
    for one in value if literal else ():
        if SPECIAL.intersection(one):
            raise ValueError(
                f"{name} has {one!r}, which is a pattern: write out the names, as no regular expressions are allowed "
                "here."
            )
