from __future__ import annotations

import pytest

from e2vpt_peft.trainer.processes import on_main_process


def test_on_one_process_what_is_made_and_what_is_raised_comes_back() -> None:
    assert on_main_process(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        on_main_process(lambda: 1 / 0)
