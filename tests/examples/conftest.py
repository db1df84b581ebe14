from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def load_script() -> Callable[[str], Any]:
    """From the name of an example to an object with its functions; the example does not run."""
    return lambda name: SimpleNamespace(**runpy.run_path(str(EXAMPLES / name), run_name=Path(name).stem))
