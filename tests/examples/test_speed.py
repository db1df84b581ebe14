"""The speed benchmark: its tables are complete, its file has what they show. Nothing here depends on time."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from examples.benchmarks import speed

TOY = [
    "--model=toy", "--rounds=2", "--seconds=0", "--adapters=3", "--mixed-batch-size=5", "--training-batch-size=2"
]  # fmt: skip


def test_tables_have_every_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "speed.jsonl"
    command = [*TOY, "--prompts", "3,2", "5,1", "--batch-size", "1", "3", "--dropout", "0", "0.1", f"--out={out}"]
    command += ["--parts", *speed.PARTS]
    rows = speed.main(command)
    printed = capsys.readouterr().out

    expected = {("operations of an inference", name, base, 2) for name in ("backbone", "LoRA") for base in BASELINES}
    for prompts in ("(3, 2)", "(5, 1)", "(0, 16), GELU"):
        for name in (f"E²VPT {prompts}", f"E²VPT {prompts}, no prefix kept", f"E²VPT {prompts}, two adapters"):
            expected |= {("operations of an inference", name, baseline, 2) for baseline in BASELINES}
    for prompts in ("(3, 2)", "(5, 1)"):
        name = f"E²VPT {prompts}, converted, no prefix kept"
        expected |= {("operations of an inference", name, baseline, 2) for baseline in BASELINES}
        for batch in (1, 3):
            for name in (f"E²VPT {prompts}", "E²VPT (0, 16), GELU", f"inserted tokens {prompts}", "LoRA"):
                expected.add(("inference time", name, "backbone", batch))
            expected.add(("inference time", f"E²VPT {prompts}, converted", "backbone", batch))
        for dropout in ("", ", dropout 0.1"):
            for measure in ("training step time", "peak memory of a training step"):
                for baseline in ("linear probe", "inserted tokens", "LoRA"):
                    expected.add((measure, f"E²VPT {prompts}{dropout}", baseline, 2))
                expected.add((measure, "E²VPT (0, 16), GELU", "LoRA", 2))
    for method in ("E²VPT (3, 2)", "E²VPT (0, 16), GELU", "LoRA"):
        expected.add(("throughput of a mixed batch", f"{method}, 3 adapters", "one adapter", 5))
    assert {(row.measure, row.subject, row.baseline, row.batch_size) for row in rows} == expected
    compiled = {row.subject for row in rows if row.mode == "compiled"}
    names = {f"E²VPT {prompts}{how}" for prompts in ("(3, 2)", "(5, 1)") for how in ("", ", converted")}
    assert compiled == names | {"E²VPT (0, 16), GELU", "LoRA"}
    counted = {row.subject: row.value for row in rows if row.measure.startswith("operations") and not row.baseline}
    assert counted["E²VPT (3, 2), converted, no prefix kept"] == counted["E²VPT (3, 2)"]
    assert all(0 < row.low <= row.value <= row.high and math.isfinite(row.high) for row in rows)
    assert f"torch {torch.__version__}" in printed and "-m examples.benchmarks.speed --model=toy" in printed

    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [line["value"] for line in lines] == [row.value for row in rows]
    assert all(line["torch"] == torch.__version__ and "benchmarks.speed " in line["command"] for line in lines)
    speed.main([f"--show={out}"])
    assert capsys.readouterr().out == printed


BASELINES = ("", "backbone")


def test_runs_in_bfloat16() -> None:
    parts = ("inference", "training", "mixed")
    rows = speed.main(
        [*TOY, "--dtype=bfloat16", "--prompts=3,2", "--batch-size=2", "--dropout=0.1", "--parts", *parts]
    )
    assert rows and all(math.isfinite(row.value) and row.value > 0 for row in rows)


def test_needs_prompts_of_both_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        speed.parse(["--prompts", "10,0"])
    assert "at least one prompt of each kind" in capsys.readouterr().err
