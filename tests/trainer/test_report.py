from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from e2vpt_peft.masks import PromptMasks
from e2vpt_peft.trainer import report
from e2vpt_peft.trainer.candidates import Candidate, Outcome
from e2vpt_peft.trainer.report import SearchReport, log_entry, printable
from e2vpt_peft.trainer.search import SearchResult


def candidate(name: str, tokens: int, parameters: int, metric: float, phase: str) -> Candidate:
    kept = torch.arange(4) < tokens
    return Candidate(
        name, PromptMasks(kept, kept[:, None].expand(-1, 2)), parameters, [(0.5, 0.0)], metric, 4.0, phase
    )


REFERENCE = candidate("unpruned", 4, 12_000, 0.81234567, "tune")
PRUNED = candidate("candidate-1", 2, 6_000, 0.8, "candidate-1")


def found(pruned: bool, final_phase: str) -> SearchReport:
    outcomes = {"tune": Outcome(0.81234567, 4.0, 16, 0.3), "candidate-1": Outcome(0.8, 3.5, 14, 0.2)}
    if final_phase == "final":
        outcomes["final"] = Outcome(0.1, 4.0, 20, 0.05)
    best = PRUNED if pruned else REFERENCE
    return SearchReport(SearchResult(REFERENCE, [PRUNED], best, final_phase, outcomes), "eval_accuracy", 0.02)


def test_the_message_says_what_was_kept() -> None:
    assert found(True, "candidate-1").message == (
        "Kept 2 of 4 visual prompts and 6,000 of 12,000 parameters (candidate-1): eval_accuracy=0.8, "
        "unpruned 0.812346."
    )
    assert found(False, "tune").message == (
        "Nothing was pruned: no candidate came within tolerance=0.02 of the unpruned adapter's eval_accuracy=0.812346."
    )


def test_the_output_counts_all_phases_and_has_the_loss_of_the_last() -> None:
    output = found(True, "final").output(runtime=1.23456)
    assert (output.global_step, output.training_loss) == (50, 0.05)
    assert output.metrics == {
        "train_runtime": 1.2346,
        "train_loss": 0.05,
        "pruning_metric": 0.8,
        "pruning_metric_unpruned": 0.81234567,
        "pruning_visual_prompts": 2,
        "pruning_parameters": 6_000,
        "pruning_epochs": 11.5,
        "pruning_message": found(True, "final").message,
        "pruning_candidates": [REFERENCE.row(), PRUNED.row()],
    }


@pytest.mark.parametrize("matplotlib", [True, False])
def test_files_are_written(matplotlib: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if matplotlib:
        pytest.importorskip("matplotlib")
    else:
        monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    found(True, "candidate-1").write(tmp_path)
    results: dict[str, Any] = json.loads((tmp_path / "pruning_results.json").read_text())
    assert list(results) == ["message", "metric", "best", "final_phase", "epochs", "candidates"]
    assert (results["best"], results["final_phase"], results["epochs"]) == ("candidate-1", "candidate-1", 7.5)
    assert results["candidates"][1] == {
        "name": "candidate-1",
        "rates": [[0.5, 0.0]],
        "tokens": 2,
        "segments": 4,
        "parameters": 6_000,
        "metric": 0.8,
        "epochs": 4.0,
        "phase": "candidate-1",
    }
    assert (tmp_path / "pruning_results.png").exists() == matplotlib


def test_log_entries() -> None:
    entry = log_entry("candidate-1-2", PRUNED, "eval_accuracy")
    expected = {"visual_prompts": 2, "segments": 4, "parameters": 6_000, "eval_accuracy": 0.8}
    assert entry == {"phase": "candidate-1-2", **expected}
    last = found(True, "final")
    assert last.log_entry() == {"phase": "done", **expected, "message": last.message}


def test_the_table_is_printed_as_its_number_of_rows() -> None:
    metrics = found(True, "candidate-1").output(0.0).metrics
    shown = printable(metrics)
    assert shown["pruning_candidates"] == "2 rows, in pruning_results.json"
    assert len(metrics["pruning_candidates"]) == 2, "what is saved is the table"
    assert metrics["pruning_message"] not in shown.values(), "a sentence would widen all columns"
    assert printable({"eval_loss": 1.0}) == {"eval_loss": 1.0}
