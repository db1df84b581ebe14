"""How things are measured: all sides are what they say, and times, memory and operations are counted right."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from examples.benchmarks.measuring import methods
from examples.benchmarks.measuring.agreement import check_close, check_same_function
from examples.benchmarks.measuring.calls import TrainingStep, inference
from examples.benchmarks.measuring.memory import peak_memory
from examples.benchmarks.measuring.operations import count_operations
from examples.benchmarks.measuring.rows import Row, latest
from examples.benchmarks.measuring.setup import SIZES, Prompts, Setup
from examples.benchmarks.measuring.tables import tables
from examples.benchmarks.measuring.timing import CLOCKS, ratios, time_side_by_side
from tests.support.models import images, tiny_vit

CPU = torch.device("cpu")
PROMPTS = Prompts(3, 2)


def sides(backbone: nn.Module) -> list[nn.Module]:
    return [
        methods.build_e2vpt(backbone, PROMPTS),
        methods.build_lora(backbone),
        methods.build_token_insertion(backbone, PROMPTS),
        methods.build_linear_probe(backbone),
    ]


def test_all_sides_have_the_type_of_the_backbone() -> None:
    backbone = methods.build_backbone(Setup(SIZES["toy"], dtype=torch.bfloat16))
    for model in sides(backbone):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("counts", [(3, 2), (10, 5)])
def test_token_insertion_is_the_same_function(counts: tuple[int, int]) -> None:
    backbone = tiny_vit().requires_grad_(False)
    e2vpt = methods.build_e2vpt(backbone, Prompts(*counts))
    inserted = methods.build_token_insertion(backbone, Prompts(*counts))
    with pytest.raises(AssertionError, match="differ"):
        check_same_function(e2vpt, inserted, images())
    methods.copy_prompts(e2vpt, inserted)
    assert check_same_function(e2vpt, inserted, images()) < 1e-5

    for model in (e2vpt, inserted):
        model(pixel_values=images()).logits.square().sum().backward()
    pairs = [(e2vpt.base_model.classifier.modules_to_save["one"].weight, inserted.classifier.weight)]
    for ours, theirs in zip(e2vpt.get_base_model().vit.layers, inserted.vit.layers):
        pairs.append((ours.attention.e2vpt_visual_prompts["one"], theirs.visual_prompts))
        pairs.append((ours.attention.e2vpt_kv_prompts["one"], theirs.attention.kv_prompts))
    for one, other in pairs:
        assert one.grad.abs().max() > 0
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-3)


def test_results_that_are_not_finite_agree_with_nothing() -> None:
    broken = torch.tensor([torch.nan])
    with pytest.raises(AssertionError, match="they differ by nan"):
        check_close(broken, broken, torch.float32, "they")


def test_token_insertion_drops_prompts_in_training_only() -> None:
    model = methods.build_token_insertion(tiny_vit(), Prompts(10, 2, dropout=0.5))
    with torch.no_grad():
        assert torch.equal(model.eval()(images()).logits, model(images()).logits)
        assert not torch.equal(model.train()(images()).logits, model(images()).logits)


def test_all_sides_share_the_frozen_weights_and_leave_the_backbone_alone() -> None:
    backbone = tiny_vit().requires_grad_(False)
    before = backbone(images()).logits
    state = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    frozen = {parameter.data_ptr() for parameter in backbone.vit.parameters()}
    labels = torch.tensor([0, 1, 2])
    for model in sides(backbone):
        assert frozen <= {parameter.data_ptr() for parameter in model.parameters()}
        trainable = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        TrainingStep(model, images(), labels)()
        after = dict(model.named_parameters())
        assert trainable and not any(torch.equal(after[name], value) for name, value in trainable.items())
    torch.testing.assert_close(backbone.state_dict(), state, rtol=0, atol=0)
    assert torch.equal(backbone(images()).logits, before)


def test_inference_is_what_users_run() -> None:
    model = tiny_vit().train()
    logits = inference(model, images())()
    assert not model.training and logits.is_inference()


def test_calls_take_turns() -> None:
    made: list[str] = []
    calls = {name: lambda name=name: made.append(name) for name in "abc"}
    times = time_side_by_side(calls, CPU, rounds=20, least_seconds=0)
    assert {name: len(values) for name, values in times.items()} == {"a": 20, "b": 20, "c": 20}
    rounds = [tuple(made[start : start + 3]) for start in range(6, 66, 3)]  # after warm-up and a first timing
    assert all(sorted(calls) == ["a", "b", "c"] for calls in rounds)
    assert len(set(rounds)) > 1


@pytest.mark.parametrize(("rounds", "expected"), [(20, 5), (3, 3)])
def test_where_time_is_short_there_are_fewer_rounds_but_five(rounds: int, expected: int) -> None:
    times = time_side_by_side({"a": lambda: None}, CPU, rounds=rounds, seconds=0, least_seconds=0)
    assert len(times["a"]) == expected


def test_the_clock_of_the_process_does_not_count_what_others_take() -> None:
    calls = {"waits": lambda: time.sleep(0.05)}
    waited = {
        clock: time_side_by_side(calls, CPU, rounds=2, clock=clock, least_seconds=0)["waits"] for clock in CLOCKS
    }
    assert min(waited["wall"]) >= 0.05 > 2 * max(waited["cpu"])


def test_ratios_are_taken_round_by_round() -> None:
    # The machine slows down tenfold on the way: no single ratio notices.
    assert ratios([1.0, 2.0, 10.0, 24.0], [2.0, 4.0, 20.0, 40.0]) == (0.5, 0.5, pytest.approx(0.525), 4)
    assert ratios([3.0], [2.0]) == (1.5, 1.5, 1.5, 1)


def test_peak_memory_counts_weights_optimizer_and_the_highest_rise() -> None:
    class Step:
        """Holds two megabytes at once, although it allocates four."""

        state = [torch.zeros(1000)]

        def __call__(self) -> None:
            for _ in range(2):
                first = torch.zeros(250_000)
                second = torch.zeros(250_000)
                del first, second

    model = nn.Linear(100, 10, bias=False)
    peak = peak_memory(Step(), model, CPU)
    assert 4000 + 4000 + 2_000_000 <= peak < 2_100_000


def test_operations_that_do_no_work_are_not_counted() -> None:
    given, buffer = torch.randn(4, 6), torch.zeros(6, 4)

    def call() -> None:
        view = given.t().expand(6, 4).to(torch.float32)
        buffer.add_(torch.nn.functional.dropout(view, 0.5, training=False))
        view.reshape(-1)  # copies: the rows do not lie behind each other
        given.reshape(-1)

    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert count_operations(call).total() == 2


def test_operations_of_a_vit() -> None:
    with torch.inference_mode():
        counts = count_operations(lambda: tiny_vit_of_two(pixel_values=images()))
    per_layer = {"aten.linear": 6, "aten.layer_norm": 2, "aten.scaled_dot_product_attention": 1, "aten.gelu": 1}
    assert {name: counts[name] for name in per_layer} == {
        name: 2 * number + (name in ("aten.linear", "aten.layer_norm")) for name, number in per_layer.items()
    }


tiny_vit_of_two = tiny_vit(num_hidden_layers=2).eval()


def test_a_table_has_a_column_for_each_baseline_mode_and_batch() -> None:
    rows = [
        Row("time", "toy", 1, "ours", "backbone", 1.0, 0.9, 1.1, 5),
        Row("time", "toy", 1, "ours", "backbone", 2.0, 1.9, 2.1, 5),  # measured anew
        Row("time", "toy", 8, "theirs", "backbone", 0.5, 0.5, 0.5, 1, mode="compiled"),
        Row("images", "toy", 8, "ours", "", 12345.0, 12345.0, 12345.0, 1),
    ]
    assert tables(latest(rows)) == (
        "### Time, toy\n\n"
        "|  | against backbone, eager, batch 1 | against backbone, compiled, batch 8 |\n"
        "| --- | --- | --- |\n"
        "| ours | 2.000 (1.900–2.100) |  |\n"
        "| theirs |  | 0.500 |\n\n"
        "### Images, toy\n\n"
        "|  | batch 8 |\n"
        "| --- | --- |\n"
        "| ours | 12,345 |"
    )
