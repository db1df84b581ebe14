"""The benchmark of growing cost: every measure at every size. Nothing here depends on time."""

from __future__ import annotations

import json
from pathlib import Path

from examples.benchmarks import growth

TINY = [
    "--image-size=16", "--patch-size=4", "--hidden-size=32", "--layers=2", "--heads=4", "--batch-size=2",
    "--rounds=2", "--prompts=3,2",
]  # fmt: skip


def test_every_measure_at_every_size(tmp_path: Path) -> None:
    out, picture = tmp_path / "growth.jsonl", tmp_path / "growth.png"
    rows = growth.main([*TINY, "--sizes", "4", "8", f"--out={out}", f"--plot={picture}"])
    measures = {growth.INFERENCE, growth.MEMORY, growth.FILE, growth.SWITCH, growth.MIXED}
    expected = {(dimension, size, name) for dimension in growth.GROWTH for size in (4, 8) for name in measures}
    assert {(row["dimension"], row["size"], row["measure"]) for row in rows} == expected
    assert all(row["ratio"] > 0 for row in rows)
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == len(rows) and "-m examples.benchmarks.growth --image-size=16" in lines[0]["command"]
    assert picture.stat().st_size > 0


def test_the_file_grows_by_the_prompts_alone() -> None:
    _, options = growth.parse(TINY)
    sizes = {}
    for visual in (3, 5):
        point, prompts, _ = growth.point(options, "visual prompts", visual)
        model = growth.speed.build_e2vpt(growth.speed.build_backbone(point), prompts)
        sizes[visual] = growth.adapter_file_size(model)
    two_layers_of_two_tokens = 2 * 2 * 32 * 4
    assert abs(sizes[5] - sizes[3] - two_layers_of_two_tokens) <= 16  # the header of the file is padded
    assert sizes[3] < 100 * 32 * 4, "the head is not in it"
