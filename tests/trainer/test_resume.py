from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from e2vpt_peft import rewind_prompts

from .interrupted import Events, Interruption, start
from .test_trainer import Trainings, same, snapshot
from .toy import adapted, make_trainer, pruning, taken


def interrupt():
    raise Interruption


def results(folder):
    return json.loads((folder / "pruning_results.json").read_text())


SAVING = {
    "nothing": {"save_strategy": "no"},
    "epochs": {"save_strategy": "epoch"},
    "steps": {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 1},
    "best": {
        "save_strategy": "epoch",
        "eval_strategy": "epoch",
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
    },
}
SMALL = {"token_rates": [0.5], "segment_rates": [0.0, 0.5]}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The result of each setting when nothing comes between."""
    known = {}

    def run(name, **options):
        if name not in known:
            folder = tmp_path_factory.mktemp(name)
            trainer, _ = start(folder, Events(float("inf"), interrupt), resume=False, **options)
            known[name] = folder, snapshot(trainer)
        return known[name]

    return run


def start_until_finished(folder, every, options):
    for attempt in range(100):
        try:
            trainer, _ = start(folder, Events(every, interrupt), resume=attempt > 0, **options)
            break
        except Interruption:
            continue
    assert attempt > 3
    return trainer


@pytest.mark.parametrize(("saving", "every"), [("nothing", 14), ("epochs", 24), ("steps", 24), ("best", 26)])
def test_a_search_that_is_interrupted_again_and_again_comes_out_the_same(tmp_path, saving, every, uninterrupted):
    options = {**SAVING[saving], "pruning": SMALL}
    folder, expected = uninterrupted(saving, **options)
    trainer = start_until_finished(tmp_path, every, options)
    assert results(tmp_path) == results(folder)
    same(snapshot(trainer), expected, 1e-6)
    rewind_prompts(trainer.model, undo_pruning=True)
    same(taken(trainer.model), taken(adapted()))


def test_halving_from_fresh_values_is_resumed_as_well(tmp_path, uninterrupted):
    pruning = {"search": "halving", "halving_factor": 2, "rewind": "fresh", "tolerance": 10.0, **SMALL}
    options = {**SAVING["epochs"], "pruning": pruning}
    folder, expected = uninterrupted("fresh", **options)
    trainer = start_until_finished(tmp_path, 24, options)
    assert results(tmp_path) == results(folder)
    assert results(folder)["best"] != "unpruned"
    same(snapshot(trainer), expected, 1e-6)


@pytest.mark.slow
def test_it_can_be_interrupted_at_every_moment(tmp_path, uninterrupted):
    options = {"save_strategy": "epoch", "num_train_epochs": 1, "pruning": {**SMALL, "segment_rates": [0.5]}}
    folder, expected = uninterrupted("every moment", **options)
    for moment in range(1, 1000):
        target = tmp_path / str(moment)
        try:
            start(target, Events(moment, interrupt), resume=False, **options)
            break
        except Interruption:
            trainer, _ = start(target, Events(float("inf"), interrupt), resume=True, **options)
        assert results(target) == results(folder)
        same(snapshot(trainer), expected, 1e-6)
    assert moment > 25


def test_finished_candidates_are_not_trained_again(tmp_path):
    trainings = Trainings()

    class StopAtThird(Trainings):
        def on_train_begin(self, args, state, control, **kwargs):
            if args.output_dir.endswith("candidate-3"):
                raise Interruption

    with pytest.raises(Interruption):
        make_trainer(tmp_path, callbacks=[StopAtThird()]).train()
    make_trainer(tmp_path, callbacks=[trainings]).train(resume_from_checkpoint=True)
    assert trainings.folders == ["candidate-3", "candidate-4"]


def test_a_phase_goes_on_from_its_last_checkpoint(tmp_path):
    steps = []

    class Stop(Trainings):
        def on_step_end(self, args, state, control, **kwargs):
            if args.output_dir.endswith("candidate-1") and state.global_step == 6:
                raise Interruption

    class Steps(Trainings):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append((args.output_dir.rpartition("/")[2], state.global_step))

    with pytest.raises(Interruption):
        make_trainer(tmp_path, save_strategy="epoch", callbacks=[Stop()]).train()
    make_trainer(tmp_path, save_strategy="epoch", callbacks=[Steps()]).train(resume_from_checkpoint=True)
    assert steps[:5] == [("candidate-1", step) for step in (5, 6, 7, 8)] + [("candidate-2", 1)]


def test_resuming_a_finished_search_gives_its_result_at_once(tmp_path):
    trainer = make_trainer(tmp_path)
    first = trainer.train()
    trainings = Trainings()
    again = make_trainer(tmp_path, model=adapted(seed=5), callbacks=[trainings])
    second = again.train(resume_from_checkpoint=True)
    assert trainings.folders == []
    same(snapshot(again), snapshot(trainer))
    for output in (first, second):
        del output.metrics["train_runtime"]
    assert second == first


def test_resuming_where_nothing_is_starts_a_search(tmp_path):
    assert make_trainer(tmp_path).train(resume_from_checkpoint=True).global_step == 40


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learning_rate": 0.5}, ["learning_rate=0.5", "0.01"]),
        ({"config": pruning(token_rates=[0.75])}, ["token_rates=[0.75]", "[0.25, 0.5]"]),
        ({"model": adapted(num_visual_prompts=6)}, ["num_visual_prompts=6", "4"]),
        ({"metric_for_best_model": "accuracy"}, ["metric_for_best_model='eval_accuracy'", "'eval_loss'"]),
    ],
)
def test_a_search_is_not_resumed_with_other_settings(tmp_path, changes, words):
    class Stop(Trainings):
        def on_train_begin(self, *args, **kwargs):
            raise Interruption

    with pytest.raises(Interruption):
        make_trainer(tmp_path, callbacks=[Stop()]).train()
    before = (tmp_path / "_pruning_state" / "state.json").read_text()
    with pytest.raises(ValueError) as raised:
        make_trainer(tmp_path, **changes).train(resume_from_checkpoint=True)
    for word in words:
        assert word in str(raised.value)
    assert (tmp_path / "_pruning_state" / "state.json").read_text() == before


def test_starting_anew_keeps_the_state_of_the_search_before(tmp_path):
    config = pruning(token_rates=[0.5], segment_rates=[0.5])
    make_trainer(tmp_path, config=config).train()
    (tmp_path / "_pruning_state" / "mark").touch()
    trainings = Trainings()
    make_trainer(tmp_path, config=config, callbacks=[trainings]).train()
    assert trainings.folders == ["tune", "candidate-1"]
    assert (tmp_path / "_pruning_state.bak" / "mark").exists()
    assert not (tmp_path / "_pruning_state" / "mark").exists()


@pytest.mark.slow
def test_a_process_that_is_killed_again_and_again_leaves_the_same_result(tmp_path, uninterrupted):
    options = {**SAVING["steps"], "pruning": SMALL}
    folder, expected = uninterrupted("steps", **options)
    root = Path(__file__).parents[2]
    for attempt in range(20):
        process = subprocess.run(
            [sys.executable, "-m", "tests.trainer.interrupted", str(tmp_path), str(24 + attempt), json.dumps(options)],
            cwd=root,
            capture_output=True,
            text=True,
        )
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, process.stderr
    assert attempt > 2
    assert results(tmp_path) == results(folder)
    saved = load_file(tmp_path / "result" / "adapter_model.safetensors")
    for name, tensor in saved.items():
        key = next(k for k in expected if k.replace(".default", "").replace(".modules_to_save", "") == name)
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=1e-6)
