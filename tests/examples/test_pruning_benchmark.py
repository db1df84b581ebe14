"""The measurement of pruning: fair to both sides, and resumable."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
script = importlib.import_module("examples.benchmarks.pruning")

TINY = ["--seeds=1", "--epochs=3", "--train_per_class=2", "--max_test_images=20", "--threads=1"]
TINY += ["--num_visual_prompts=3", "--num_segments=4", "--learning_rates", "0.01"]


def test_half_compares_pruned_with_unpruned(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = script.main([*TINY, "--what=half"])
    assert 0 <= row["pruned"] <= 1 and 0 <= row["unpruned"] <= 1
    # 1 of 3 tokens goes, half of the segments of the others, no key-value prompts: the same with any seed
    assert 1 / 3 < row["parameters_left"] < 1
    assert "| digits | 1 | 0.01 |" in capsys.readouterr().out


def test_learning_rate_is_the_best_on_validation_images(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    args = script.Arguments(learning_rates=[0.1, 0.01, 0.03], out=str(tmp_path / "results.jsonl"))
    results = script.Results(args)
    task = script.Task([], ["validation"], ["test"], None)
    monkeypatch.setattr(script, "prepare", lambda args, dataset, seed: task)
    tried: list[float] = []
    monkeypatch.setattr(script, "fit", lambda model, images, epochs, rate, seed: tried.append(rate))
    found = {0.01: 0.5, 0.03: 0.7, 0.1: 0.7}
    monkeypatch.setattr(
        script, "accuracy", lambda model, images: found[tried[-1]] if images == ["validation"] else pytest.fail()
    )
    assert script.choose_learning_rate(args, "digits", None, results) == 0.03
    assert script.choose_learning_rate(args, "digits", None, script.Results(args)) == 0.03
    assert tried == [0.01, 0.03, 0.1]  # once each: the second time the file has them


def test_searches_share_their_trainings_and_are_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "results.jsonl"
    command = [*TINY, "--what=search", "--rates", "0.4", "0.7", "--halving_rounds=2", f"--out={out}"]
    (row,) = script.main(command)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    trainings = [(line["candidate"], line["epochs"]) for line in lines if line["kind"] == "training"]
    assert len(trainings) == len(set(trainings)) == 8  # 4 candidates, in full and for one epoch
    assert row["grid"]["epochs"] == 4 * 3 and row["halving"]["epochs"] == 4 * 1 + 2 * 3
    full = {line["candidate"]: line["validation"] for line in lines if line.get("epochs") == 3}
    assert row["grid"]["validation"] == max(full.values())
    assert row["halving"]["validation"] == full[row["halving"]["winner"]]

    out.write_text("".join(json.dumps(line) + "\n" for line in lines[:5]))  # killed after five trainings
    again: list[int] = []
    fit = script.fit
    monkeypatch.setattr(script, "fit", lambda *arguments: (again.append(1), fit(*arguments)))
    assert script.main(command) == [row]
    assert len(again) == 1 + 3
