"""The GPU command, with toys on the CPU: cases run, are recorded, fail and are resumed as its text says."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.benchmarks import gpu
from examples.benchmarks.measuring.calls import inference
from examples.benchmarks.measuring.rows import Row
from examples.benchmarks.on_gpu import checks, runner
from examples.benchmarks.on_gpu.cases import Case, Machine, NotHere, Options
from examples.benchmarks.on_gpu.plan import PEAK, plan
from examples.benchmarks.on_gpu.report import write_report
from examples.benchmarks.on_gpu.results import Results

QUICK = (
    "works: bfloat16", "works: autocast, float16", "works: mixed batch", "works: kept prefixes", "works: sdpa",
    PEAK, "numbers: inference, eager, batch 2", "numbers: inference, CUDA graph", "numbers: training, eager, batch 2",
    "numbers: adapters in a batch, 6", "numbers: looks at the loss, batch 1",
)  # fmt: skip


def machine(folder: Path, minutes: float = 60, toy: bool = True) -> Machine:
    options = Options(folder, "cpu", toy, minutes)
    return Machine(options, runner.time.time() + 60 * minutes)


def test_a_dry_run_of_the_quick_cases(tmp_path: Path) -> None:
    cases = [case for case in plan(toy=True) if case.name.startswith(QUICK)]
    results = runner.run(cases, machine(tmp_path))
    statuses = {case.name: results.by_case[case.name]["status"] for case in cases}
    needs_cuda = {name for name in statuses if "CUDA" in name or "cudnn" in name or "memory-efficient" in name}
    assert {name for name, status in statuses.items() if status == "not here"} == needs_cuda
    assert all(status == "passed" for name, status in statuses.items() if name not in needs_cuda), statuses
    assert {row.measure for row in results.rows} >= {"inference time", "images per second", "training step time"}

    report = write_report(results, [case.name for case in plan(toy=True)])
    assert "| works: bfloat16 | passed |" in report and "### Share of the card's measured peak, toy" in report
    assert "Not begun: works: tests; works: float32; " in report
    assert {path.name for path in tmp_path.iterdir()} == {
        "results.jsonl", "report.md", "inference_time.png", "training_step_time.png"
    }  # fmt: skip


def test_every_case_has_a_name_of_its_own_and_toys_have_as_many() -> None:
    for toy in (True, False):
        names = [case.name for case in plan(toy)]
        assert len(set(names)) == len(names) == 53


def test_a_check_sees_what_is_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first: list[torch.Tensor] = []

    def stale(model: Any, images: torch.Tensor) -> Any:
        call = inference(model, images)
        first.append(call())
        return lambda: first[0]

    monkeypatch.setattr(checks, "inference", stale)
    with pytest.raises(AssertionError, match="Results after an optimiser step differ by"):
        checks.check_kept_prefixes(machine(tmp_path))


def test_a_check_sees_wrong_prompts_in_a_mixed_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def confused(*args: Any) -> Any:
        model = adapted(*args)
        forward = model.forward
        model.forward = lambda adapter_names=None, **kwargs: forward(
            adapter_names=adapter_names and adapter_names[::-1], **kwargs
        )
        return model

    adapted = checks.adapted
    monkeypatch.setattr(checks, "adapted", confused)
    with pytest.raises(AssertionError, match="A mixed batch and '__base__' alone differ by"):
        checks.check_mixed_batch(machine(tmp_path))


def not_here(_: Machine) -> dict[str, Any]:
    raise NotHere("there is none")


def fails(_: Machine) -> dict[str, Any]:
    raise ValueError("wrong")


ROW = Row("time", "toy", 1, "ours", "", 1.0, 1.0, 1.0, 1)


def test_what_fails_is_recorded_and_what_has_passed_is_not_run_again(tmp_path: Path) -> None:
    ran: list[str] = []

    def passes(_: Machine) -> list[Row]:
        ran.append("passes")
        return [ROW]

    cases = [Case("fails", fails, 1), Case("missing", not_here, 1), Case("passes", passes, 1)]
    for _ in range(2):
        results = runner.run(cases, machine(tmp_path))
        assert [result["status"] for result in results.by_case.values()] == ["failed", "not here", "passed"]
    assert ran == ["passes"] and results.rows == [ROW]
    assert "ValueError: wrong" in results.by_case["fails"]["error"]
    cases[0] = Case("fails", passes, 1)
    assert runner.run(cases, machine(tmp_path)).by_case["fails"]["status"] == "passed"
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["status"] for line in lines if line["case"] == "fails"] == [
        "begun", "failed", "begun", "failed", "begun", "passed"
    ]  # fmt: skip


def test_what_has_no_time_left_is_not_begun(tmp_path: Path) -> None:
    cases = [Case("long", fails, 120), Case("short", lambda _: {"found": 1}, 1)]
    results = runner.run(cases, machine(tmp_path, minutes=1, toy=False))
    assert list(results.by_case) == ["short"]


def crashing(options: Options, deadline: float, tried: Iterable[str]) -> None:
    cases = [Case("crash", lambda _: os._exit(9), 1), Case("next", lambda _: {"found": 1}, 1)]
    runner.run(cases, Machine(options, deadline), tried)


def test_a_crash_costs_its_case_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "START_METHOD", "fork")  # quicker
    results = runner.supervise(Options(tmp_path, "cpu", True, 1), crashing)
    assert {name: result["status"] for name, result in results.by_case.items()} == {
        "crash": "failed",
        "next": "passed",
    }
    assert "The process ended with 9" in results.by_case["crash"]["error"]


def breaking(options: Options, deadline: float, tried: Iterable[str]) -> None:
    cases = [Case("breaks", not_here, 1), Case("next", lambda _: {"found": 1}, 1)]
    runner.answers = lambda _: False  # in this process only
    runner.run(cases, Machine(options, deadline), tried)


def test_a_device_that_answers_no_more_costs_its_case_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "START_METHOD", "fork")
    results = runner.supervise(Options(tmp_path, "cpu", True, 1), breaking)
    assert {name: result["status"] for name, result in results.by_case.items()} == {
        "breaks": "failed",
        "next": "passed",
    }
    assert results.by_case["breaks"]["error"] == "there is none"


def test_a_process_that_never_starts_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "START_METHOD", "fork")
    with pytest.raises(RuntimeError, match="ends with 7"):
        runner.supervise(Options(tmp_path, "cpu", True, 1), lambda *_: os._exit(7))


def test_the_report_of_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Results(tmp_path).add("works: tests", "failed", error="1\n2 failed", seconds=3.0)
    gpu.main([f"--out={tmp_path}", "--report"])
    assert "| works: tests | failed | 3.0 | 2 failed |" in capsys.readouterr().out


def test_an_unknown_case(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="there is no such case"):
        gpu.main([f"--out={tmp_path}", "--only", "nothing"])
