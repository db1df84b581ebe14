"""The speed benchmark: its rivals compute the same, its table is complete. Nothing here depends on time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from examples.benchmarks import speed
from tests.support.models import images, tiny_vit

TINY = [
    "--image-size=16", "--patch-size=4", "--hidden-size=32", "--layers=2", "--heads=4", "--batch-size", "2", "3",
    "--rounds=2", "--mixed-rounds=1", "--adapters=3", "--mixed-batch-size=5",
]  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads only wait for each other in models as small as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_table_has_every_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "speed.jsonl"
    command = [*TINY, "--prompts", "3,2", "5,1", "--dropout", "0", "0.1", "--out", str(out)]
    rows = speed.main(command)

    expected = set()
    for batch in (2, 3):
        for prompts in ("3, 2", "5, 1"):
            for subject in ("E²VPT", "token insertion"):
                expected.add(("inference time", subject, "bare backbone", prompts, None, batch))
            for dropout in (0.0, 0.1):
                for measure in ("training step time", "training step peak memory"):
                    for rival in ("token insertion", "LoRA"):
                        expected.add((measure, "E²VPT", rival, prompts, dropout, batch))
    for method, prompts in (("E²VPT", "3, 2"), ("LoRA", "")):
        subject = f"{method}, 3 adapters in the batch"
        expected.add(("throughput", subject, f"{method}, one adapter", prompts, None, 5))
    found = [(row.measure, row.subject, row.rival, row.prompts, row.dropout, row.batch_size) for row in rows]
    assert set(found) == expected and len(found) == len(expected)
    for row in rows:
        assert 0 < row.low <= row.ratio <= row.high and math.isfinite(row.high), row

    printed = capsys.readouterr().out
    assert printed.count("\n| ") == len(rows) + 2
    assert f"torch {torch.__version__}" in printed and "-m examples.benchmarks.speed --image-size=16" in printed
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [line["ratio"] for line in lines] == [row.ratio for row in rows]
    assert all(line["torch"] == torch.__version__ and "benchmarks.speed " in line["command"] for line in lines)


def test_runs_in_bfloat16() -> None:
    rows = speed.main([*TINY, "--dtype=bfloat16", "--prompts", "3,2", "--dropout", "0.1"])
    assert all(math.isfinite(row.ratio) and row.ratio > 0 for row in rows)


def test_all_rivals_train_in_the_type_of_the_backbone() -> None:
    backbone = speed.build_backbone(speed.parse([*TINY, "--dtype=bfloat16"]))
    prompts = speed.Prompts(3, 2)
    for model in (
        speed.build_e2vpt(backbone, prompts),
        speed.build_lora(backbone),
        speed.build_token_insertion(backbone, prompts),
    ):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("counts", [(3, 2), (10, 5)])
def test_token_insertion_is_the_same_function(counts: tuple[int, int]) -> None:
    backbone = tiny_vit().requires_grad_(False)
    e2vpt = speed.build_e2vpt(backbone, speed.Prompts(*counts))
    inserted = speed.build_token_insertion(backbone, speed.Prompts(*counts))
    with pytest.raises(AssertionError, match="differ"):
        speed.check_same_function(e2vpt, inserted, images())
    speed.copy_prompts(e2vpt, inserted)
    assert speed.check_same_function(e2vpt, inserted, images()) < 1e-5

    for model in (e2vpt, inserted):
        model(pixel_values=images()).logits.square().sum().backward()
    pairs = [(e2vpt.base_model.classifier.modules_to_save["one"].weight, inserted.classifier.weight)]
    for ours, theirs in zip(e2vpt.get_base_model().vit.layers, inserted.vit.layers):
        pairs.append((ours.attention.e2vpt_visual_prompts["one"], theirs.visual_prompts))
        pairs.append((ours.attention.e2vpt_kv_prompts["one"], theirs.attention.kv_prompts))
    for one, other in pairs:
        assert one.grad.abs().max() > 0
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-3)


def test_token_insertion_drops_prompts_in_training_only() -> None:
    model = speed.build_token_insertion(tiny_vit(), speed.Prompts(10, 2, dropout=0.5))
    with torch.no_grad():
        assert torch.equal(model.eval()(images()).logits, model(images()).logits)
        assert not torch.equal(model.train()(images()).logits, model(images()).logits)


def test_rivals_share_the_frozen_weights_and_leave_the_backbone_alone() -> None:
    backbone = tiny_vit().requires_grad_(False)
    before = backbone(images()).logits
    state = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    frozen = {parameter.data_ptr() for parameter in backbone.vit.parameters()}
    labels = torch.tensor([0, 1, 2])
    prompts = speed.Prompts(3, 2)
    for model in (
        speed.build_e2vpt(backbone, prompts),
        speed.build_lora(backbone),
        speed.build_token_insertion(backbone, prompts),
    ):
        assert frozen <= {parameter.data_ptr() for parameter in model.parameters()}
        trainable = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        speed.training_step(model, images(), labels)()
        after = dict(model.named_parameters())
        assert trainable and not any(torch.equal(after[name], value) for name, value in trainable.items())
    torch.testing.assert_close(backbone.state_dict(), state, rtol=0, atol=0)
    assert torch.equal(backbone(images()).logits, before)


def test_calls_take_turns() -> None:
    made: list[str] = []
    times = speed.time_side_by_side(
        {name: lambda name=name: made.append(name) for name in "abc"}, rounds=20, device=CPU, least_seconds=0
    )
    assert {name: len(values) for name, values in times.items()} == {"a": 20, "b": 20, "c": 20}
    rounds = [tuple(made[start : start + 3]) for start in range(6, 66, 3)]  # after warm-up and a first timing
    assert all(sorted(calls) == ["a", "b", "c"] for calls in rounds)
    assert len(set(rounds)) > 1


def test_ratios_are_taken_round_by_round() -> None:
    # The machine slows down tenfold on the way: no single ratio notices.
    found = speed.ratios([1.0, 2.0, 10.0, 24.0], [2.0, 4.0, 20.0, 40.0])
    assert found == {"ratio": 0.5, "low": 0.5, "high": pytest.approx(0.525), "rounds": 4}
    assert speed.ratios([3.0], [2.0]) == {"ratio": 1.5, "low": 1.5, "high": 1.5, "rounds": 1}


def test_peak_memory_counts_weights_optimizer_and_the_highest_rise() -> None:
    class Step:
        """Holds two megabytes at once, although it allocates four."""

        state = {"parameter": {"momentum": torch.zeros(1000)}}

        def __call__(self) -> None:
            for _ in range(2):
                first = torch.zeros(250_000)
                second = torch.zeros(250_000)
                del first, second

    model = nn.Linear(100, 10, bias=False)
    peak = speed.peak_memory(Step(), model, CPU)
    assert 4000 + 4000 + 2_000_000 <= peak < 2_100_000


def test_wanted_ratios_are_for_vit_b_on_a_cpu_alone() -> None:
    assert speed.is_vit_b_on_cpu(speed.parse([]))
    assert not speed.is_vit_b_on_cpu(speed.parse(TINY))
    assert not speed.is_vit_b_on_cpu(speed.parse(["--device=cuda"]))


def test_needs_prompts_of_both_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        speed.parse(["--prompts", "10,0"])
    assert "at least one prompt of each kind" in capsys.readouterr().err
