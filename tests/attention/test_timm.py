from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TIMM = Path(sys.prefix, "timm")  # see timm_without_torchvision.py


@pytest.mark.slow
@pytest.mark.skipif(not TIMM.exists(), reason=f"timm is not in {TIMM}: pip install --no-deps --target {TIMM} timm")
def test_models_of_timm():
    """In a process of its own, as it needs a stand-in for torchvision that no other test should see."""
    plugins = ["-p", "tests.support.timm_without_torchvision", "-p", "no:cacheprovider", "-n", "0"]
    command = [sys.executable, "-m", "pytest", "-q", *plugins, "tests/support/with_timm.py"]
    process = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stdout
