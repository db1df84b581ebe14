"""What runs as a program of its own: the tests, the trainer, the accuracy suite."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[3]


def environment() -> dict[str, str]:
    """That of this process, with the checkout where Python looks for modules."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path}
