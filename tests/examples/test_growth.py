"""The benchmark of growing cost: every measure at every size. Nothing here depends on time."""

from __future__ import annotations

import json
from pathlib import Path

from examples.benchmarks import growth
from examples.benchmarks.measuring.methods import build_backbone, build_e2vpt
from examples.benchmarks.measuring.setup import SIZES, Prompts, Setup

TOY = ["--model=toy", "--batch-size=2", "--rounds=2", "--prompts=3,2"]


def test_every_measure_at_every_size(tmp_path: Path) -> None:
    out, picture = tmp_path / "growth.jsonl", tmp_path / "growth.png"
    rows = growth.main([*TOY, "--sizes", "4", "8", f"--out={out}", f"--plot={picture}"])
    measures = {growth.INFERENCE, growth.MEMORY, growth.FILE, growth.SWITCH, growth.MIXED}
    expected = {(dimension, size, name) for dimension in growth.GROWTH for size in (4, 8) for name in measures}
    assert {(row["dimension"], row["size"], row["measure"]) for row in rows} == expected
    assert all(row["ratio"] > 0 for row in rows)
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == len(rows) and "-m examples.benchmarks.growth --model=toy" in lines[0]["command"]
    assert picture.stat().st_size > 0


def test_the_file_grows_by_the_prompts_alone() -> None:
    sizes = {}
    for visual in (3, 5):
        setup, prompts, _ = growth.point(Setup(SIZES["toy"]), Prompts(3, 2), "visual prompts", visual)
        sizes[visual] = growth.adapter_file_size(build_e2vpt(build_backbone(setup), prompts))
    two_layers_of_two_tokens = 2 * 2 * 64 * 4
    assert abs(sizes[5] - sizes[3] - two_layers_of_two_tokens) <= 16  # the header of the file is padded
    assert sizes[3] < 100 * 64 * 4, "the head is not in it"
