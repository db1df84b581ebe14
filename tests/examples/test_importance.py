"""The measurements of scores and of pruning run, agree with the package, and go on where they stopped."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from e2vpt_peft import score_prompts
from e2vpt_peft.pruning import SCORING_METHODS

pytest.importorskip("sklearn")
importance = importlib.import_module("examples.benchmarks.importance")

TINY = ["--seeds=1", "--epochs=1", "--train_per_class=2", "--max_test_images=20", "--threads=1"]
TINY += ["--num_visual_prompts=3", "--num_segments=2"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    out = tmp_path_factory.mktemp("importance") / "results.jsonl"
    return out, importance.main([*TINY, f"--out={out}"])


def test_every_method_is_compared_with_leave_one_out(measured: tuple[Path, list[dict[str, Any]]]) -> None:
    out, results = measured
    single = [r for r in results if r["dtype"] == "float32"]
    assert {(r["depth"], r["method"]) for r in single} == {
        (d, m) for d in ("deep", "shallow") for m in SCORING_METHODS
    }
    exact = [r for r in results if r["method"] == "leave_one_out"]
    assert all(r["tokens"] == pytest.approx(1) and r["segments"] == pytest.approx(1) for r in exact)
    assert all(-1 <= r[column] <= 1 for r in results for column in ("tokens_unseen", "segments_unseen"))
    assert len(out.read_text().splitlines()) == len(results)
    assert json.loads(out.read_text().splitlines()[0])["settings"]["epochs"] == 1


def test_gradient_scores_are_made_in_float64_too(measured: tuple[Path, list[dict[str, Any]]]) -> None:
    double = [r for r in measured[1] if r["dtype"] == "float64"]
    assert {r["method"] for r in double} == {"absolute", "signed", "first_order"}
    shallow = [r for r in double if r["depth"] == "shallow"]  # no norm hides their scale, float32 is enough
    assert all(r["tokens_by_float32"] == pytest.approx(1) for r in shallow)


def test_tables_have_a_row_for_every_method_and_precision(measured: tuple[Path, list[dict[str, Any]]]) -> None:
    results = measured[1]
    assert importance.table(results).count("| deep |") == len(SCORING_METHODS) + 3
    assert importance.table(results, by_task=True).count("| digits | shallow |") == len(SCORING_METHODS) + 3
    assert importance.precision_table(results).count("| float64 |") == 2


def test_finished_runs_are_not_measured_again(
    measured: tuple[Path, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, results = measured
    monkeypatch.setattr(importance, "measure_run", lambda *_: pytest.fail("was finished"))
    assert importance.main([*TINY, f"--out={out}"]) == results


def test_results_of_other_settings_are_not_taken(measured: tuple[Path, list[dict[str, Any]]]) -> None:
    options = importance.Arguments(epochs=2, out=str(measured[0]))
    assert importance.Results(options).find(task="digits") == []


def test_removals_are_what_leave_one_out_computes() -> None:
    options = importance.Arguments(train_per_class=2, max_test_images=4, num_visual_prompts=3, num_segments=2)
    train, _ = importance.load_task(options, None, 0)
    images = importance.batches(options, train)
    for depth in options.depths:
        model = importance.make_model(options, train, 0, depth).eval()
        removed = importance.removals(model, images, [0, 3], num_segments=2)
        scores = score_prompts(model, images, "leave_one_out", progress_bar=False)
        torch.testing.assert_close(removed.tokens, scores.tokens.float(), atol=1e-6, rtol=1e-3)
        torch.testing.assert_close(removed.segments, scores.segments.flatten()[[0, 3]].float(), atol=1e-6, rtol=1e-3)
