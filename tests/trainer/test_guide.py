from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_code_in_the_guide_runs_as_written(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "pruning.md").read_text(), re.DOTALL)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile("\n".join(blocks), "docs/pruning.md", "exec"), names)
    results = json.loads((tmp_path / "digits" / "pruning_results.json").read_text())
    assert names["output"].metrics["pruning_candidates"] == results["candidates"]
    assert names["args"].metric_for_best_model == "accuracy"
    assert (tmp_path / "digits.png").exists()
    assert (tmp_path / "pruned" / "adapter_model.safetensors").exists()
    assert (tmp_path / "digits" / "adapter_model.safetensors").exists()
