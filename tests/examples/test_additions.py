"""What was tried on top of prompts beside the attention: that each does what it says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from e2vpt_peft.initialization import KEY_STD
from examples.benchmarks import additions as command
from examples.benchmarks.accuracy import additions, trials
from examples.benchmarks.accuracy.additions import prompted, prompts_of
from examples.benchmarks.accuracy.backbones import build
from examples.benchmarks.accuracy.methods import Pruning
from examples.benchmarks.accuracy.recipes import Plan
from examples.benchmarks.accuracy.steps import EagerStep
from examples.benchmarks.accuracy.tasks import Task

CLASSES = 3
HEAD_SIZE = 8  # of tiny_backbone


@pytest.fixture
def make(tiny_backbone: str) -> Callable[..., tuple[Any, torch.optim.Optimizer]]:
    """A model as a method makes it, with an optimizer that does not move it."""

    def make(method: Any, learning_rate: float = 0.0) -> tuple[Any, torch.optim.Optimizer]:
        model = method.adapt(build(tiny_backbone, CLASSES, seed=0), Task("a", "natural", "drawn"))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return model, torch.optim.AdamW(trained, lr=learning_rate)

    return make


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(6, 3, 16, 16, generator=generator), torch.tensor([0, 1, 2, 0, 1, 2])


@torch.no_grad()
def give_values(model: Any) -> None:
    """Values that are not zero, so that prompts do something."""
    torch.manual_seed(1)
    for layer in prompted(model):
        prompts_of(layer)[1].normal_()


def states_of(model: Any, pixels: torch.Tensor, projection: str) -> list[torch.Tensor]:
    """What a projection gives in each layer, (tokens of all images, heads, head size)."""
    seen: list[torch.Tensor] = []
    for layer in prompted(model):
        module = layer.base_layer.get_submodule(projection)
        module.register_forward_hook(lambda _, inputs, output: seen.append(output.detach().flatten(0, 1)))
    model(pixel_values=pixels)
    return [states.unflatten(-1, (-1, HEAD_SIZE)) for states in seen]


def test_scales_change_nothing_at_the_start_and_keys_and_values_later(make: Any, batch: Any) -> None:
    pixels, _ = batch
    plain, scaled = (make(method)[0] for method in (additions.beside("plain"), additions.SCALED))
    scaled.load_state_dict(plain.state_dict(), strict=False)
    expected = plain(pixel_values=pixels).logits
    assert torch.equal(scaled(pixel_values=pixels).logits, expected)
    scales = {name: parameter for name, parameter in scaled.named_parameters() if name.endswith(".scale")}
    assert len(scales) == 4 and all(parameter.requires_grad for parameter in scales.values())
    for parameter in scales.values():
        with torch.no_grad():
            parameter.fill_(2)
        assert not torch.allclose(scaled(pixel_values=pixels).logits, expected)
        with torch.no_grad():
            parameter.fill_(1)


def test_key_prompts_start_as_keys_of_images(make: Any, batch: Any) -> None:
    model, optimizer = make(additions.beside("from images"))
    additions.FromImages(model, optimizer, "float32")(*batch)
    for layer, states in zip(prompted(model), states_of(model, batch[0], "k_proj")):
        keys = prompts_of(layer)[0, 0].transpose(0, 1)
        assert torch.allclose(keys.norm(dim=-1), torch.tensor(KEY_STD * HEAD_SIZE**0.5))
        directions = torch.nn.functional.normalize(states, dim=-1)
        likeness = torch.einsum("phd,thd->pth", torch.nn.functional.normalize(keys, dim=-1), directions).amin(-1)
        assert torch.allclose(likeness.amax(1), torch.tensor(1.0)), "the same token in all heads"
        # Class tokens of all images are alike in the first layer.
        assert len(set(likeness.argmax(1).tolist())) > len(keys) / 2, "other tokens for other prompts"


def test_queries_are_white_in_the_coordinates_of_whitened_prompts(
    make: Any, batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(additions, "DAMPING", 1e-6)
    model, optimizer = make(additions.beside("whitened"))
    step = additions.Whitened(model, optimizer, "float32")
    step(*batch)
    for layer, states in zip(prompted(model), states_of(model, batch[0], "q_proj")):
        coordinates = torch.eye(HEAD_SIZE).expand(2, 1, 4, -1, -1)  # each is one prompt
        layer.e2vpt_kv_prompts["default"] = torch.nn.Parameter(coordinates.clone())
        keys, _ = layer._kv_prompts("default", 1)
        scores = torch.einsum("thd,phd->thp", states, keys[0])
        moments = torch.einsum("thp,thq->hpq", scores, scores) / len(scores)
        size = states.square().sum(-1).mean(0) / HEAD_SIZE  # of each head's queries, before
        assert torch.allclose(moments, size[:, None, None] * torch.eye(HEAD_SIZE), atol=1e-3 * float(size.max()))


def test_noise_differs_between_samples_falls_with_depth_and_is_for_training_only(make: Any, batch: Any) -> None:
    pixels, labels = batch
    model, optimizer = make(additions.beside("noise"))
    give_values(model)
    expected = model.eval()(pixel_values=pixels).logits
    additions.Noisy(model, optimizer, "float32")
    assert torch.equal(model(pixel_values=pixels).logits, expected)
    model.train()
    deviations = []
    for layer in prompted(model):
        _, values = layer._kv_prompts("default", layer._samples(2000, []))
        factors = values / prompts_of(layer)[1].transpose(-3, -2)
        assert torch.allclose(factors, factors[:, :1]), "shared by prompts"
        deviations.append(float(factors.std(0).mean()))
    assert deviations == pytest.approx([0.5, 0.25], rel=0.05)
    same = pixels[:1].expand(2, -1, -1, -1)
    one, other = model(pixel_values=same).logits
    assert not torch.allclose(one, other)


def test_consistency_is_a_loss_of_its_own(make: Any, batch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def gradient(weight: float, noise: float) -> torch.Tensor:
        monkeypatch.setattr(additions, "CONSISTENCY", weight)
        monkeypatch.setattr(additions, "NOISE", noise)
        model, optimizer = make(additions.beside("consistency"))
        give_values(model)
        monkeypatch.setattr(optimizer, "zero_grad", lambda: None)
        step = additions.Consistent(model.train(), optimizer, "float32")
        torch.manual_seed(0)
        step(*batch)
        return prompts_of(prompted(model)[0]).grad

    model, optimizer = make(additions.beside("plain"))
    give_values(model)
    optimizer.zero_grad = lambda: None
    EagerStep(model.train(), optimizer, "float32")(*batch)
    plain = prompts_of(prompted(model)[0]).grad
    assert torch.allclose(gradient(1, 0), plain, atol=1e-6), "two passes that are equal"
    assert not torch.allclose(gradient(1, 0.5), gradient(0, 0.5), atol=1e-5)


def test_half_of_the_prompts_that_move_are_idle(make: Any, batch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(additions, "MOVE_EVERY", 2)
    model, optimizer = make(additions.beside("moved", number=32), learning_rate=0.1)
    step = additions.Moved(model, optimizer, "float32")
    first = step.active.clone()
    for number in range(1, 6):
        step(*batch)
        assert torch.equal(step.active, first) == (number < 2)
        assert step.active.sum() == 32
        for layer, active in zip(prompted(model), step.active):
            values = prompts_of(layer)[1, 0]
            assert not values[:, ~active].any(), "idle prompts do nothing"
            assert number % 2 == 0 or values[:, active].any()


def test_prompts_that_harm_leave_their_layer_for_the_one_that_gains(make: Any, batch: Any) -> None:
    model, optimizer = make(additions.beside("moved", number=32), learning_rate=0.1)
    step = additions.Moved(model, optimizer, "float32")
    step(*batch)  # the optimizer has a state by now
    give_values(model)
    before = [prompts_of(layer).detach().clone() for layer in prompted(model)]
    step.scores.zero_()
    step.scores[0, 3:7] = torch.tensor([2.0, 3.0, 1.0, 1.0])  # by their removal the loss would fall
    step.scores[1, 0] = -1
    step.move()
    assert step.active.sum(1).tolist() == [15, 17]  # of two layers, each gets one
    assert step.active[1, 16] and not step.active[0, 4]
    for layer, was in zip(prompted(model), before):
        prompts = prompts_of(layer)
        changed = (prompts != was).any(-1)[1, 0].any(0)
        assert not prompts[1, 0][:, changed].any(), "what starts anew changes nothing yet"
        state = optimizer.state[prompts]["exp_avg"]
        assert not state[..., changed, :].any() and state[..., ~changed, :].any()


def test_the_command_trains_each_once_and_prints_a_table(
    tiny_backbone: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "additions.jsonl"
    options = ["--suite", "mini", "--data_dir", str(data.parent), "--model", tiny_backbone, "--tasks", data.name]
    options += ["--epochs", "2", "--batch_size", "5", "--out", str(out)]
    records = command.main(options)
    names = [addition.method.name for addition in additions.ADDITIONS]
    assert [record["settings"]["method"] for record in records] == names
    rows = capsys.readouterr().out.splitlines()[-len(names) :]
    assert [row.split(" | ")[0] for row in rows] == [f"| {name}" for name in names]
    by_name = dict(zip(names, records))
    assert rows[names.index("0 + 16")] == f"| 0 + 16 | {100 * by_name['0 + 16']['accuracy']:.1f} |"
    assert by_name["48 + 8, pruned to 16 + 8"]["trainable"] == by_name["16 + 8"]["trainable"]

    lines = out.read_text()
    assert command.main([*options, "--additions", "0 + 16", "moved"]) == [by_name["0 + 16"], by_name["moved"]]
    assert out.read_text() == lines, "what is there is not trained again"
    assert command.main([*options, "--additions", "0 + 16", "--learning_rate", "3e-3"])[0] not in records


@pytest.mark.parametrize(("number", "expected"), [(7, 7), (None, 24)])
def test_prompts_that_are_pruned_are_scored_on_so_many_images(
    number: int | None, expected: int, tiny_backbone: str, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[int] = []

    def score_prompts(model: Any, batches: list[Any], *args: Any, **options: Any) -> Any:
        scored.append(sum(len(batch["labels"]) for batch in batches))
        return score(model, batches, *args, **options)

    score = trials.score_prompts
    monkeypatch.setattr(trials, "score_prompts", score_prompts)
    plan = Plan(tiny_backbone, str(data.parent), "quick", 1, 8, (0,), "cpu")
    trainings = trials.Trainings(Task(data.name, "natural", "dataset", data.name), plan)
    method = additions.beside("a", 4, 2, Pruning(segments=False, images=number))
    trial = trials.Trial(method, "validation", 1e-2, 0.0, 0, (0.5, 0.0), 1)
    trainings.measure(method, trial.part, trainings.optimisation(trial), trial.rates)
    assert scored == [expected]


@pytest.mark.parametrize(("option", "value"), [("additions", "0 + 64"), ("precision", "float16")])
def test_the_command_names_what_it_does_not_know(option: str, value: str) -> None:
    with pytest.raises(ValueError, match=rf"{option}.*{value.replace('+', '.')}.* must be"):
        command.Arguments(**{"out": "a", "model": "b", option: [value] if option == "additions" else value})
