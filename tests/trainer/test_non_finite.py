"""A loss that is NaN or infinite stops the search with phase, step and cause, or gives up the candidate if asked."""

from __future__ import annotations

import json
import math
import os

import pytest
import torch
from transformers import TrainerCallback

from .test_trainer import same, snapshot
from .toy import BrightPatch, adapted, make_trainer, pruning

SMALL = {"token_rates": [0.5], "segment_rates": [0.0, 0.5]}


class Spoil(TrainerCallback):
    """Makes a prompt NaN before a step of a phase, as an update that overflows does."""

    def __init__(self, model, phase, step):
        self.model, self.phase, self.step = model, phase, step

    def happens(self, args, state):
        return args.output_dir.endswith(f"/{self.phase}") and state.global_step == self.step

    def on_step_begin(self, args, state, control, **kwargs):
        if self.happens(args, state):
            self.spoil()

    @torch.no_grad()
    def spoil(self):
        next(p for name, p in self.model.named_parameters() if "e2vpt_visual" in name)[0, 0] = float("nan")


class SpoilAtTheEnd(Spoil):
    def on_step_begin(self, *args, **kwargs):
        pass

    def on_train_end(self, args, state, control, **kwargs):
        if self.happens(args, state):
            self.spoil()


def spoilt(folder, phase, step, kind=Spoil, **options):
    model = adapted()
    config = pruning(**SMALL, **options)
    return make_trainer(folder, model=model, config=config, callbacks=[kind(model, phase, step)])


def candidates(folder):
    results = json.loads((folder / "pruning_results.json").read_text())
    return {row["name"]: row for row in results["candidates"]}


@pytest.mark.parametrize("phase", ["tune", "candidate-1"])
def test_a_loss_that_is_not_finite_stops_with_phase_step_and_cause(tmp_path, phase):
    with pytest.raises(FloatingPointError) as raised:
        spoilt(tmp_path, phase, 5).train()
    for words in (f"phase '{phase}' is nan at step 6", "e2vpt_visual_prompts", "lower learning rate"):
        assert words in str(raised.value)


def test_bad_data_is_named_as_the_cause(tmp_path):
    data = BrightPatch(32, seed=1)
    data.images[9] = float("inf")
    with pytest.raises(FloatingPointError, match="phase 'tune' is .* at step.*NaN or infinite values in pixel_values"):
        make_trainer(tmp_path, train_dataset=data).train()


def test_an_overflow_in_half_precision_is_named_as_the_cause(tmp_path):
    model = adapted()
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.mul_(1e38)
    with pytest.raises(FloatingPointError, match="Batch and weights are finite.*float16"):
        make_trainer(tmp_path, model=model).train()


def test_a_last_update_that_overflows_is_no_result(tmp_path):
    with pytest.raises(FloatingPointError, match="visual_prompts.*after the last step of phase 'tune' \\(8\\)"):
        spoilt(tmp_path, "tune", 8, SpoilAtTheEnd).train()


@pytest.mark.parametrize("kind", [Spoil, SpoilAtTheEnd])
def test_a_candidate_is_given_up_if_asked(tmp_path, kind):
    step = 5 if kind is Spoil else 8
    trainer = spoilt(tmp_path / "spoilt", "candidate-1", step, kind, skip_diverged=True, tolerance=100.0)
    trainer.train()
    rows = candidates(tmp_path / "spoilt")
    assert math.isnan(rows["candidate-1"]["metric"])
    assert math.isfinite(rows["candidate-2"]["metric"])
    whole = make_trainer(tmp_path / "whole", config=pruning(**SMALL, tolerance=100.0))
    whole.train()
    assert rows["candidate-2"] == candidates(tmp_path / "whole")["candidate-2"]
    assert all(tensor.isfinite().all() for tensor in snapshot(trainer).values())


def test_tuning_is_never_skipped(tmp_path):
    with pytest.raises(FloatingPointError, match="phase 'tune'"):
        spoilt(tmp_path, "tune", 3, skip_diverged=True).train()


def test_scoring_stops_with_the_batch(tmp_path):
    trainer = make_trainer(tmp_path)
    bad = BrightPatch(32, seed=1)
    bad.images[17] = float("nan")
    fit = trainer._fit

    def then_bad_data(*args):
        outcome = fit(*args)
        trainer.train_dataset = bad
        return outcome

    trainer._fit = then_bad_data
    with pytest.raises(FloatingPointError, match="began with batch 2.*pixel_values"):
        trainer.train()


@pytest.fixture
def nondeterministic_again():
    environment = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(environment)
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


def test_full_determinism_gives_the_same_bits(tmp_path, nondeterministic_again):
    trainers = []
    for run in ("one", "two"):
        torch.manual_seed(len(trainers))
        trainers.append(make_trainer(tmp_path / run, config=pruning(**SMALL), full_determinism=True, seed=3))
        trainers[-1].train()
        assert torch.are_deterministic_algorithms_enabled()
    same(*map(snapshot, trainers))
    first, second = ((tmp_path / run / "pruning_results.json").read_text() for run in ("one", "two"))
    assert first == second
