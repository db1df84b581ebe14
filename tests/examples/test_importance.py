"""The measurement of scores runs and gives a row for every method and depth."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from e2vpt_peft.importance import SCORING_METHODS

SCRIPT = Path(__file__).parents[2] / "examples" / "benchmarks" / "importance.py"


def test_every_method_is_compared_with_leave_one_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("importance_benchmark", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = sys.modules["importance_benchmark"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    out = tmp_path / "results.jsonl"
    tiny = ["--seeds=1", "--epochs=1", "--train_per_class=2", "--max_test_images=20", "--threads=1"]
    results = script.main([*tiny, "--num_visual_prompts=3", "--num_segments=2", f"--out={out}"])

    assert {(r["depth"], r["method"]) for r in results} == {
        (d, m) for d in ("deep", "shallow") for m in SCORING_METHODS
    }
    exact = [r for r in results if r["method"] == "leave_one_out"]
    assert all(r["tokens"] == pytest.approx(1) and r["segments"] == pytest.approx(1) for r in exact)
    assert all(-1 <= r[column] <= 1 for r in results for column in ("tokens_unseen", "segments_unseen"))
    assert len(out.read_text().splitlines()) == len(results)
    assert json.loads(out.read_text().splitlines()[0])["arguments"]["seeds"] == 1
    assert capsys.readouterr().out.count("| deep |") == len(SCORING_METHODS)
