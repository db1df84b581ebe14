from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="package")
def _quick_garbage_collection() -> Iterator[None]:
    """Trainer collects garbage at the start of every training, which is half the time of tiny ones."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
