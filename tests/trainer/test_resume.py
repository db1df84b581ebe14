from __future__ import annotations

import json
import os
import runpy
import signal
import sys
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback

from e2vpt_peft import rewind_prompts

from ..support.children import child, ended
from ..support.disk import contents
from ..support.models import tiny_vit
from .interrupted import Events, Interruption, start
from .test_trainer import Trainings, phase, same, snapshot
from .toy import TRAIN, BrightPatch, adapted, make_trainer, pruning, taken


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


def test_as_a_program_a_search_kills_itself_and_is_resumed(tmp_path, monkeypatch, uninterrupted):
    folder, _ = uninterrupted("nothing", **SAVING["nothing"], pruning=SMALL)
    monkeypatch.setattr(os, "kill", lambda *_: interrupt())
    options = json.dumps({**SAVING["nothing"], "pruning": SMALL})
    for events in ("14", "inf"):
        monkeypatch.setattr(sys, "argv", ["", str(tmp_path), events, options])
        with pytest.raises(Interruption) if events == "14" else nullcontext():
            runpy.run_module("tests.trainer.interrupted", run_name="__main__", alter_sys=True)
        assert (tmp_path / "pruning_results.json").exists() == (events == "inf")
    assert results(tmp_path) == results(folder)
    assert (tmp_path / "result").is_dir()


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


def test_a_trainer_that_has_finished_gives_its_result_again(tmp_path):
    trainer = make_trainer(tmp_path, config=pruning(tolerance=9.0))
    trainer.train()
    before, results = taken(trainer.model), (tmp_path / "pruning_results.json").read_bytes()
    trainer.train(resume_from_checkpoint=True)
    assert (tmp_path / "pruning_results.json").read_bytes() == results
    assert all(torch.equal(value, before[name]) for name, value in taken(trainer.model).items())


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

    def search(last):
        kill = Events(last, lambda: os.kill(os.getpid(), signal.SIGKILL))
        trainer, _ = start(tmp_path, kill, (tmp_path / "_pruning_state").exists(), **options)
        trainer.save_model(str(tmp_path / "result"))

    for attempt in range(20):
        if ended(child(partial(search, 24 + attempt))):
            break
    assert attempt > 2
    assert results(tmp_path) == results(folder)
    saved = load_file(tmp_path / "result" / "adapter_model.safetensors")
    for name, tensor in saved.items():
        key = next(k for k in expected if k.replace(".default", "").replace(".modules_to_save", "") == name)
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=1e-6)


class StopAtSave(Trainings):
    """Interrupts a phase when a checkpoint of some step is written."""

    def __init__(self, phase, step):
        super().__init__()
        self.phase, self.step = phase, step

    def on_save(self, args, state, control, **kwargs):
        if args.output_dir.endswith(self.phase) and state.global_step == self.step:
            raise Interruption


class Augmented(torch.utils.data.Dataset):
    def __len__(self):
        return len(TRAIN)

    def __getitem__(self, index):
        sample = TRAIN[index]
        return {**sample, "pixel_values": sample["pixel_values"] + 0.3 * torch.randn(3, 16, 16)}


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, endless=False):
        self.endless = endless

    def __iter__(self):
        yield from (TRAIN[index] for index in range(len(TRAIN)))
        while self.endless:
            yield from (TRAIN[index] for index in range(len(TRAIN)))


def constant(prediction):
    return {"accuracy": 0.5}


STEPS = {"save_strategy": "steps", "save_steps": 1}
EPOCHS = {"save_strategy": "epoch", "eval_strategy": "epoch", "metric_for_best_model": "accuracy"}
STOPPING = {**EPOCHS, "num_train_epochs": 5, "compute_metrics": constant}


def early():
    return [EarlyStoppingCallback(early_stopping_patience=2)]


@pytest.mark.parametrize(
    ("step", "callbacks", "options"),
    [
        (8, early, STOPPING),
        (12, early, STOPPING),  # the one that stops the training
        (8, lambda: [*early(), EarlyStoppingCallback(3)], STOPPING),
        (8, early, {**EPOCHS, "num_train_epochs": 4, "load_best_model_at_end": True}),
        (8, list, {**EPOCHS, "num_train_epochs": 4, "load_best_model_at_end": True, "compute_metrics": constant}),
        (6, list, {**STEPS, "train_dataset": Augmented()}),
        (6, list, {**STEPS, "accelerator_config": {"use_seedable_sampler": False}}),
        (6, list, {**STEPS, "max_steps": 6}),
        (6, list, {**STEPS, "max_steps": 7, "train_dataset": Stream()}),
        (3, list, {**STEPS, "max_steps": 4, "train_dataset": Stream(endless=True)}),
        (3, list, {**STEPS, "ignore_data_skip": True, "restore_callback_states_from_checkpoint": True}),
        (3, list, {**STEPS, "save_only_model": True}),
    ],
)
def test_a_phase_that_is_cut_off_at_a_checkpoint_ends_the_same(tmp_path, step, callbacks, options):
    options = {**options, "config": pruning(**SMALL)}
    undisturbed = make_trainer(tmp_path / "undisturbed", callbacks=callbacks(), **options)
    expected = undisturbed.train()
    with pytest.raises(Interruption):
        stop = StopAtSave("candidate-1", step)
        make_trainer(tmp_path / "killed", callbacks=[*callbacks(), stop], **options).train()
    # Paths in a checkpoint are those of the folder in which it was written.
    (tmp_path / "killed").rename(tmp_path / "moved")
    resumed = make_trainer(tmp_path / "moved", model=adapted(seed=5), callbacks=callbacks(), **options)
    output = resumed.train(resume_from_checkpoint=True)
    assert results(tmp_path / "moved") == results(tmp_path / "undisturbed")
    for one in (output, expected):
        del one.metrics["train_runtime"]
    assert output == expected
    for name in ("candidate-1", "candidate-2"):
        same(phase(tmp_path / "moved", name), phase(tmp_path / "undisturbed", name))
    same(snapshot(resumed), snapshot(undisturbed))


CHANGES = {
    "data.train_dataset.samples": {"train_dataset": BrightPatch(32, seed=77)},
    "data.train_dataset.length": {"train_dataset": BrightPatch(16, seed=1)},
    "data.eval_dataset.samples": {"eval_dataset": BrightPatch(24, seed=9)},
    "data.final_train_dataset.length": {"final_train_dataset": BrightPatch(24, seed=9)},
    "trainer.compute_metrics": {"compute_metrics": constant},
    "trainer.callbacks": {"callbacks": early()},
    "arguments.lr_scheduler_type": {"lr_scheduler_type": "constant"},
    "arguments.warmup_steps": {"warmup_steps": 3},
    "arguments.optim": {"optim": "sgd"},
    "arguments.adam_beta1": {"adam_beta1": 0.5},
    "arguments.max_grad_norm": {"max_grad_norm": 0.01},
    "arguments.label_smoothing_factor": {"label_smoothing_factor": 0.5},
    "arguments.dataloader_drop_last": {"dataloader_drop_last": True},
    "arguments.seed": {"seed": 7},
    "processes.mixed_precision": {"bf16": True},
    "pruning.tolerance": {"config": pruning(tolerance=0.5)},
    "adapter.prompt_dropout": {"model": {"prompt_dropout": 0.9}},
    "adapter.kv_prompt_dropout": {"model": {"kv_prompt_dropout": 0.9}},
    "adapter.layers_to_transform": {"model": {"layers_to_transform": [0]}},
    "adapter.modules_to_save": {"model": {"modules_to_save": None}},
    "adapter.target_modules": {"model": {"target_modules": ["0.attention"]}},
}


@pytest.fixture(scope="module")
def cut_off(tmp_path_factory):
    """A search that was cut off before its first step."""

    class Stop(Trainings):
        def on_train_begin(self, *args, **kwargs):
            raise Interruption

    folder = tmp_path_factory.mktemp("cut_off")
    with pytest.raises(Interruption):
        make_trainer(folder, callbacks=[Stop()]).train()
    return folder


@pytest.mark.parametrize("name", CHANGES)
def test_whatever_results_depend_on_is_compared(cut_off, name):
    changes = dict(CHANGES[name])
    if "model" in changes:
        changes["model"] = adapted(**changes["model"])
    before = contents(cut_off)
    with pytest.raises(ValueError, match="was started with other settings") as raised:
        make_trainer(cut_off, **changes).train(resume_from_checkpoint=True)
    assert f"{name}=" in str(raised.value)
    assert contents(cut_off) == before


def test_another_backbone_is_refused(cut_off):
    model = adapted()
    model.base_model.model.vit.layernorm.weight.data[3] += 0.25
    with pytest.raises(ValueError, match="backbone.weights="):
        make_trainer(cut_off, model=model).train(resume_from_checkpoint=True)


def test_harmless_arguments_may_change(tmp_path):
    config = pruning(token_rates=[0.5], segment_rates=[0.5])
    make_trainer(tmp_path, config=config).train()
    changes = {"save_strategy": "epoch", "logging_strategy": "steps", "logging_steps": 1, "run_name": "again"}
    make_trainer(tmp_path, config=config, **changes).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("value", ["good", [1, 2], None])
def test_a_metric_that_is_no_number_is_refused_before_training(tmp_path, value):
    trainings = Trainings()
    config = pruning(metric_for_best_model="mine")
    trainer = make_trainer(tmp_path, config=config, callbacks=[trainings], compute_metrics=lambda _: {"mine": value})
    with pytest.raises(TypeError, match="'eval_mine' is .*compute_metrics must return a number"):
        trainer.train()
    assert trainings.folders == [] and list(tmp_path.iterdir()) == []


def test_data_that_cannot_be_trained_on_are_refused_before_training(tmp_path):
    class WithoutLabels(Augmented):
        def __getitem__(self, index):
            return {"pixel_values": TRAIN[index]["pixel_values"]}

    trainings = Trainings()
    for name in ("train_dataset", "final_train_dataset"):
        with pytest.raises(ValueError, match="returns no loss"):
            make_trainer(tmp_path, callbacks=[trainings], **{name: WithoutLabels()}).train()
    with pytest.raises(ValueError, match="final_train_dataset has no length"):
        make_trainer(tmp_path, callbacks=[trainings], final_train_dataset=Stream()).train()
    assert trainings.folders == []


def test_a_loaded_adapter_is_refused_where_there_is_nothing_to_resume(tmp_path):
    adapted().save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(tiny_vit(num_hidden_layers=2), tmp_path / "adapter", is_trainable=True)
    with pytest.raises(ValueError, match="rewind='saved'"):
        make_trainer(tmp_path / "out", model=model).train(resume_from_checkpoint=True)
