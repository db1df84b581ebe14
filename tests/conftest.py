from __future__ import annotations

import os
from collections.abc import Iterator

# No test may reach the Hub; code that does gets an error at once instead of a time-out.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

import e2vpt_peft  # noqa: F401  (registers the method)

from .support.native import skipping_where_transformers_refuses_this_peft


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU with CUDA")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def convolving_in_float32(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests on a GPU compare with a CPU, and cuDNN otherwise rounds what it convolves to the 10 bits of TF32."""
    if request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(autouse=True, scope="session")
def transformers_with_another_peft() -> Iterator[None]:
    with skipping_where_transformers_refuses_this_peft():
        yield


@pytest.fixture(autouse=True)
def single_threaded() -> Iterator[None]:
    """Tiny models gain nothing from threads, which on a busy machine wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
