"""The search on an engine: two workers, early stopping, kills."""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from torch import nn

from examples.benchmarks import compare, report
from examples.benchmarks.accuracy import (
    checkpoints,
    engines,
    methods,
    protocol,
    recipes,
    records,
    tasks,
    training,
    trials,
)

ROOT = Path(__file__).parents[2]
EPOCHS = 9
CLASSES = 3
PRUNED = methods.e2vpt("E²VPT, pruned", methods.Pruning())
PRUNED_AFTER = methods.e2vpt("E²VPT, pruned", methods.Pruning(), "E²VPT")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Noise in which one channel is a little brighter, which is the class: not every learning rate learns it."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "noise").mkdir()
    random = np.random.default_rng(0)
    features = Features({"image": Image(), "label": ClassLabel(num_classes=CLASSES)})
    for name, number in (("train", 60), ("test", 30)):
        labels = [index % CLASSES for index in range(number)]
        arrays = random.integers(0, 200, (number, 16, 16, 3))
        for array, label in zip(arrays, labels):
            array[..., label] += 50
        images = [PILImage.fromarray(array.astype(np.uint8)) for array in arrays]
        Dataset.from_dict({"image": images, "label": labels}, features=features).to_parquet(
            folder / "noise" / f"{name}.parquet"
        )
    return str(folder)


@pytest.fixture
def plan(tiny_backbone: str, data_dir: str) -> Any:
    return recipes.Plan(tiny_backbone, data_dir, "quick", EPOCHS, 8, (0,), "cpu")


@pytest.fixture
def task() -> Any:
    return tasks.dataset_task(Path("noise"))


def lines(out: Path) -> dict[str, dict[str, Any]]:
    """The records by their settings, but for what differs from run to run."""
    found = {records.key(r["settings"]): r for r in records.read(out)}
    assert len(found) == len(records.read(out)), "nothing is run twice"
    return {name: {k: v for k, v in r.items() if k not in ("seconds", "history")} for name, r in found.items()}


# Checkpoints


class Killed(Exception):
    pass


@pytest.fixture
def final_weights(monkeypatch: pytest.MonkeyPatch) -> Callable[[], dict[str, torch.Tensor]]:
    """The weights of the model that was evaluated last."""
    models: list[nn.Module] = []
    evaluate = trials.accuracy
    monkeypatch.setattr(trials, "accuracy", lambda model, *rest: models.append(model) or evaluate(model, *rest))
    return lambda: {name: value.clone() for name, value in models[-1].state_dict().items()}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("rates", [None, (0.3, 0.5)])
@pytest.mark.parametrize("epochs_before", [1, EPOCHS + 3])
def test_training_goes_on_where_it_was_killed(
    optimizer: str, rates: Any, epochs_before: int, plan: Any, task: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, final_weights: Callable[[], dict[str, torch.Tensor]],
) -> None:  # fmt: skip
    if rates is None and epochs_before > EPOCHS:
        pytest.skip("without pruning there is no second training")
    how = training.Optimisation(optimizer, 1e-2, 1e-4, EPOCHS, 8, seed=0)
    whole = trials.Trainings(task, plan).measure(PRUNED, "validation", how, rates)
    expected = final_weights()

    done: list[int] = []
    after = checkpoints.Progress.after

    def killed_after(self: Any, epoch: int, *rest: Any) -> None:
        after(self, epoch, *rest)
        done.append(epoch)
        if len(done) == epochs_before:
            raise Killed

    monkeypatch.setattr(checkpoints.Progress, "after", killed_after)
    folder = checkpoints.Checkpoints(tmp_path / "unfinished", 0.0)
    with pytest.raises(Killed):
        trials.Trainings(task, plan, folder, shared=True).measure(PRUNED, "validation", how, rates)
    resumed = trials.Trainings(task, plan, folder, shared=True).measure(PRUNED, "validation", how, rates)
    assert len(done) == EPOCHS * (1 if rates is None else 2), "no epoch is trained twice"
    assert {**resumed, "seconds": 0} == {**whole, "seconds": 0}
    found = final_weights()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_trainings_that_prune_share_what_comes_before(
    plan: Any, task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    epochs: list[int] = []
    scored: list[int] = []
    after, score = checkpoints.Progress.after, trials.score_prompts
    monkeypatch.setattr(checkpoints.Progress, "after", lambda *args: epochs.append(args[1]) or after(*args))
    monkeypatch.setattr(trials, "score_prompts", lambda *args, **opts: scored.append(1) or score(*args, **opts))
    out = tmp_path / "out.jsonl"
    compare.run_cell(task, [methods.e2vpt(), PRUNED_AFTER], plan, out, 1, checkpoint_seconds=60.0)
    searched = [r for r in records.read(out) if r["settings"]["part"] == "validation"]
    last = records.read(out)[-1]["settings"]
    pruned = last["rates"] != [0.0, 0.0]
    assert last["method"] == "E²VPT, pruned" and len(searched) == 5 + 4
    assert len(epochs) == EPOCHS * (5 + 4 + 1 + pruned), "the final two share, too"
    assert len(scored) == 1 + pruned
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]

    apart = trials.Trainings(task, plan)
    for record in records.read(out):
        settings = record["settings"]
        method = PRUNED_AFTER if settings["rates"] else methods.e2vpt()
        how = training.Optimisation(
            "adamw", settings["learning_rate"], settings["weight_decay"], EPOCHS, 8, settings["seed"]
        )
        rates = tuple(settings["rates"]) if settings["rates"] else None
        assert apart.measure(method, settings["part"], how, rates)["accuracy"] == record["accuracy"]


def test_a_state_is_replaced_as_a_whole_and_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, settings = checkpoints.Checkpoints(tmp_path, 0.0), {"seed": 0}
    folder.write(settings, {"epoch": 1})

    def half(state: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        with pytest.raises(OSError, match="No space left"):
            folder.write(settings, {"epoch": 2})
    assert folder.read(settings) == {"epoch": 1}
    assert folder.read({"seed": 1}) is None
    torch.save({"epoch": ROOT}, folder.path(settings))  # an object, not a tensor or a number
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        folder.read(settings)
    folder.forget(settings)
    assert list(tmp_path.iterdir()) == []


# Early stopping


def test_rungs_are_the_grace_epochs_tripled(plan: Any) -> None:
    assert plan.rungs == []
    many = {**vars(plan), "epochs": 100}
    assert [recipes.Plan(**many | {"grace_epochs": grace}).rungs for grace in (10, 1, 99)] == [
        [10, 30, 90], [1, 3, 9, 27, 81], [99]
    ]  # fmt: skip


class Halves:
    """An engine in this process, that stops every other training at its first rung."""

    def __init__(self) -> None:
        self.trained: list[Any] = []

    def run(self, jobs: Any, tell: Any) -> None:
        for number, job in enumerate(jobs):
            reports: list[Any] = []

            def report(record: Any, number: int = number, reports: Any = reports) -> None:
                reports.append(record)
                if number % 2:
                    raise Killed

            self.trained += [] if job.known else [job]
            try:
                tell(job, engines.work(job, 1, report))
            except Killed:
                tell(job, reports[-1])


def test_stopped_trainings_are_no_results(plan: Any, task: Any, tmp_path: Path) -> None:
    early = recipes.Plan(**{**vars(plan), "grace_epochs": 2})
    store = records.Store(tmp_path / "out.jsonl")
    unfinished = checkpoints.Checkpoints(tmp_path / "unfinished", 0.0)
    engine = Halves()
    found = protocol.Bench(task, early, store, unfinished, engine=engine).search(methods.e2vpt())
    stopped = [r for r in records.read(store.path) if r["settings"]["part"] == "stopped"]
    finished = [r for r in records.read(store.path) if r["settings"]["part"] == "validation"]
    assert len(stopped) == 2 and len(finished) == 3
    assert all(r["epochs_done"] == 2 and len(r["history"]) == 1 for r in stopped)
    assert all([epoch for epoch, _ in r["history"]] == [2, 6] for r in finished)
    best = max(finished, key=lambda r: r["accuracy"])
    assert (
        max(r["accuracy"] for r in finished if r["settings"]["learning_rate"] == found.learning_rate)
        == best["accuracy"]
    )
    assert list(unfinished.folder.iterdir()) == []

    again = protocol.Bench(task, early, records.Store(store.path), unfinished, engine=Halves())
    assert again.search(methods.e2vpt())[1:] == found[1:] and again.engine.trained == []
    lost = store.path.read_text(encoding="utf-8").splitlines(keepends=True)
    store.path.write_text("".join(lost[1:]), encoding="utf-8")
    again = protocol.Bench(task, early, records.Store(store.path), unfinished, engine=Halves())
    again.search(methods.e2vpt())
    assert len(again.engine.trained) == 1, "the others only tell again what they were at"
    plain = protocol.Bench(task, plan, records.Store(store.path))
    plain.search(methods.e2vpt())
    assert len(records.read(store.path)) == 5 + 2, "without early stopping, what was stopped is trained"


# The engines


@pytest.mark.slow
@pytest.mark.parametrize("name", engines.ENGINES)
def test_two_workers_stop_poor_trainings_early(name: str, plan: Any, task: Any, tmp_path: Path) -> None:
    pytest.importorskip(name)
    alone = records.Store(tmp_path / "alone.jsonl")
    protocol.Bench(task, plan, alone).search(methods.e2vpt())
    early = recipes.Plan(**{**vars(plan), "grace_epochs": 1})
    store = records.Store(tmp_path / "early.jsonl")
    unfinished = checkpoints.Checkpoints(tmp_path / "unfinished", 60.0)
    with engines.start(name, engines.Workers(2, 1, None, 0.0)) as engine:
        best = protocol.Bench(task, early, store, unfinished, engine=engine).search(methods.e2vpt()).learning_rate
        bad = methods.e2vpt("bad", num_visual_prompts=-1)
        with pytest.raises(Exception, match="num_visual_prompts=-1 must be 0 or more"):
            protocol.Bench(task, plan, store, unfinished, engine=engine).search(bad)

    everything = lines(store.path)
    stopped = [r for r in everything.values() if r["settings"]["part"] == "stopped"]
    finished = {n: r for n, r in everything.items() if r["settings"]["part"] == "validation"}
    assert len(stopped) + len(finished) == 5 and {r["epochs_done"] for r in stopped} <= {1, 3}
    assert stopped, "two workers cannot have been the best of all five at every rung"
    assert finished.items() <= lines(alone.path).items(), "one that was not stopped is as ever"
    assert best in {r["settings"]["learning_rate"] for r in finished.values()}


def wait_for(what: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 300) -> Any:
    end = time.monotonic() + seconds
    while not (found := what()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)
    return found


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes that train."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        name = " ".join(child.cmdline())
        if name.startswith("ray::ImplicitFunc") or "spawn_main" in name:
            found.append(child)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method"), [("ray", "E²VPT"), ("optuna", "E²VPT, pruned")])
def test_two_workers_that_are_killed_find_what_one_process_finds(
    name: str, method: str, plan: Any, task: Any, tiny_backbone: str, data_dir: str, tmp_path: Path
) -> None:
    pytest.importorskip(name)  # Ray starts new processes for every search, so it has fewer
    plan = recipes.Plan(**{**vars(plan), "epochs": 12})
    out = tmp_path / "killed.jsonl"
    command = [
        sys.executable, "-m", "examples.benchmarks.compare", f"--out={out}", f"--data_dir={data_dir}",
        "--tasks=noise", f"--model={tiny_backbone}", "--epochs=12", "--batch_size=8", "--seeds=0", "--device=cpu",
        f"--engine={name}", "--processes=2", "--checkpoint_seconds=0.1", "--methods", method,
    ]  # fmt: skip

    def half_done() -> list[Path]:
        return [path for path in tmp_path.glob("killed.jsonl.unfinished-*/*") if path.is_file()]

    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        wait_for(half_done, process)
        killed = workers_of(process)[0]
        killed.kill()
        wait_for(lambda: len(records.read(out)) >= 3, process)
        workers = wait_for(lambda: [worker for worker in workers_of(process) if worker != killed], process)
    finally:
        process.kill()
        process.communicate()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive, "the workers end with the command"
    before = lines(out)

    resumed = compare.main(command[3:])
    (method_alone,) = methods.choose(methods.METHODS, [method])
    alone = compare.run_cell(task, [method_alone], plan, tmp_path / "alone.jsonl", 1, 60.0)
    assert [r["settings"] for r in resumed] == [r["settings"] for r in alone]
    assert lines(out) == lines(tmp_path / "alone.jsonl") and before.items() <= lines(out).items()
    assert half_done() == []
    report.main([str(out)])


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine=slurm"], r"engine='slurm' must be one of ray, optuna\."),
        (["--processes=0"], r"processes=0 must be 1 or more\."),
        (["--engine=optuna", "--address=auto"], r"address='auto' needs engine='ray', but engine='optuna'\."),
        (["--gpus_per_training=0.5"], r"gpus_per_training=0.5 needs engine='ray', but engine=None\."),
        (["--grace_epochs=3"], r"grace_epochs=3 needs an engine: ray, optuna\."),
        (["--engine=ray", "--epochs=9", "--grace_epochs=9"], r"grace_epochs=9 must be from 1 to 8"),
    ],
)
def test_what_cannot_be_is_told_in_words(options: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        compare.main([f"--out={tmp_path / 'out.jsonl'}", *options])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", engines.ENGINES)
def test_an_engine_that_is_not_installed_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=rf"engine='{name}' needs .* pip install '\.\[search\]'"):
        compare.main([f"--out={tmp_path / 'out.jsonl'}", f"--engine={name}"])
