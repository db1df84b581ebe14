"""Pruning step by step runs through, and keeps what it says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from e2vpt_peft import E2VPTConfig


def test_all_steps(load_script: Callable[[str], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--train_images=32", "--test_images=20", "--epochs=1", f"--output_dir={tmp_path}"]
    results = load_script("pruning.py").main([*few, "--token_rate=0.4", "--segment_rate=0.25"])
    assert list(results) == ["tuned", "pruned", "rewound", "pruned and tuned again"]
    config = E2VPTConfig.from_pretrained(str(tmp_path))
    assert config.token_mask is not None and sum(config.token_mask) == 6
    assert config.segment_mask is not None and [sum(row) for row in config.segment_mask if any(row)] == [12] * 6
    assert "visual prompts         10 ->          6" in capsys.readouterr().out
