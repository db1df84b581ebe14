from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(find_spec("timm") is None, reason="timm is not installed: pip install --no-deps timm")
def test_models_of_timm():
    """In a process of its own, as it needs a stand-in for torchvision that no other test should see."""
    plugins = ["-p", "tests.timm_without_torchvision", "-p", "no:cacheprovider", "-n", "0"]
    command = [sys.executable, "-m", "pytest", "-q", *plugins, "tests/with_timm.py"]
    process = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stdout
