from __future__ import annotations

import warnings

import pytest
from console import InputError, hide_notices, run


def test_wrong_input_ends_a_script_with_a_sentence() -> None:
    def main() -> None:
        raise InputError("There is no recipe.")

    with pytest.raises(SystemExit) as stop:
        run(main)
    assert stop.value.code == "error: There is no recipe."


def test_other_errors_keep_their_traceback() -> None:
    def main() -> None:
        raise ValueError("a fault")

    with pytest.raises(ValueError, match="a fault"):
        run(main)


def test_warnings_that_are_no_notices_are_shown() -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        hide_notices()
        warnings.warn("will change", FutureWarning, stacklevel=1)
        warnings.warn("your head is frozen", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in shown] == ["your head is frozen"]
