"""Several trainings at a time, poor ones stopped early (ASHA): by Ray Tune, or by Optuna with processes of ours.

A worker sends back what it measured, and the process that was started by hand writes it to the results. That file and
the folder of checkpoints are all that outlives a kill, so that either engine, or none, goes on from there.
"""

from __future__ import annotations

import importlib.util
import math
import multiprocessing
import os
import shutil
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from transformers.utils import logging

from .checkpoints import Checkpoints
from .protocol import Engine
from .recipes import REDUCTION, Plan
from .records import Record
from .steps import set_precision
from .tasks import Task
from .trials import Job, Trainings

KILLS = 3
"""So many times a training goes on after its process was killed."""


def set_up(threads: int, precision: str) -> None:
    """What every process that trains does first."""
    torch.set_num_threads(threads)
    set_precision(precision)
    logging.set_verbosity_error()  # a new head is no news
    logging.disable_progress_bar()


@lru_cache(maxsize=1)
def trainings_of(task: Task, plan: Plan, folder: str, seconds: float, shared: bool) -> Trainings:
    """Kept, so that a process reads the images of a task once."""
    return Trainings(task, plan, Checkpoints(Path(folder), seconds), shared)


def work(job: Job, threads: int, report: Callable[[Record], None]) -> Record:
    """Do a job in this process. `report` may raise to stop it."""
    if job.known:
        history = job.known.get("history", [])
        for number, (epoch, found) in enumerate(history, start=1):
            report({"accuracy": found, "epochs_done": epoch, "history": history[:number]})
        return job.known
    set_up(threads, job.plan.precision)
    trainings = trainings_of(job.task, job.plan, job.checkpoints, job.checkpoint_seconds, job.shared)
    trial = job.trial
    how = trainings.optimisation(trial)
    return trainings.measure(trial.method, trial.part, how, trial.rates, report if job.stoppable else None)


@dataclass(frozen=True)
class Workers:
    """What the engines have in common.

    Attributes:
        number (`int`): Trainings at a time.
        threads (`int`): CPU threads of each.
        address (`str`, *optional*): Of a Ray cluster; else all run on this machine.
        gpus (`float`): The part of a GPU that each gets of Ray.
    """

    number: int
    threads: int
    address: str | None
    gpus: float


class RayEngine:
    """Ray Tune, on this machine or on a cluster."""

    def __init__(self, workers: Workers) -> None:
        self.workers = workers

    def __enter__(self) -> RayEngine:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
        os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # the results have a file of their own
        os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # whose progress tables cannot be turned off
        import ray

        checkout = str(Path(__file__).parents[3])  # where Ray's processes find this package, wherever they start
        path = os.pathsep.join([checkout, *filter(None, [os.environ.get("PYTHONPATH")])])
        options: dict[str, Any] = {
            "log_to_driver": False,
            "logging_level": "error",
            "runtime_env": {"env_vars": {"PYTHONPATH": path}},
        }
        if self.workers.address is None:
            options |= {
                "num_cpus": self.workers.number * self.workers.threads,
                "include_dashboard": False,
                "object_store_memory": 100 * 2**20,  # no images go through it
            }
        ray.init(self.workers.address or "local", **options)
        return self

    def __exit__(self, *error: object) -> None:
        import ray

        ray.shutdown()

    def run(self, jobs: Sequence[Job], tell: Callable[[Job, Record], None]) -> None:
        from ray import tune
        from ray.tune.experiment import Trial
        from ray.tune.schedulers import ASHAScheduler

        workers, here = self.workers, os.getcwd()

        def train(config: dict[str, Any], jobs: Sequence[Job]) -> None:
            def report(record: Record, finished: bool = False, error: str | None = None) -> None:
                epochs = record.get("epochs_done", job.plan.epochs)
                shown = {"accuracy": record.get("accuracy", math.nan), "epochs": epochs}
                tune.report({**shown, "record": record, "finished": finished, "error": error})

            job = jobs[config["job"]]
            os.chdir(here)  # paths may be relative to where the command was given
            try:
                record = work(job, workers.threads, report)
            except Exception:
                report({}, error=traceback.format_exc())
            else:
                report(record, finished=True)

        class Results(tune.Callback):
            def on_trial_result(
                self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
            ) -> None:
                if result["error"]:
                    raise RuntimeError(result["error"])
                if result["finished"]:
                    tell(jobs[trial.config["job"]], result["record"])

            def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
                if not trial.last_result["finished"]:
                    tell(jobs[trial.config["job"]], trial.last_result["record"])

        plan, folder = jobs[0].plan, Path(jobs[0].checkpoints).absolute() / "ray"
        scheduler = None
        if plan.rungs and jobs[0].stoppable:
            scheduler = ASHAScheduler(
                "epochs", max_t=plan.epochs, grace_period=plan.rungs[0], reduction_factor=REDUCTION
            )
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(train, jobs=jobs), {"cpu": workers.threads, "gpu": workers.gpus}),
            param_space={"job": tune.grid_search(list(range(len(jobs))))},
            tune_config=tune.TuneConfig(
                metric="accuracy",
                mode="max",
                scheduler=scheduler,
                max_concurrent_trials=workers.number,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                storage_path=str(folder),
                callbacks=[Results()],
                failure_config=tune.FailureConfig(max_failures=KILLS),
                verbose=0,
            ),
        )
        try:
            results = tuner.fit()
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if results.errors:
            raise RuntimeError(f"A training failed {KILLS + 1} times.") from results.errors[0]


class Stopped(Exception):
    """Raised in a worker: the training is stopped early."""


class Worker:
    """A process that does one job after the other."""

    def __init__(self, threads: int) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, threads), daemon=True)
        self.process.start()
        other.close()

    def close(self) -> None:
        self.pipe.close()
        self.process.kill()
        self.process.join()


def serve(pipe: Any, threads: int) -> None:
    """What a worker does."""

    def die_with_parent() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    def report(record: Record) -> None:
        pipe.send(("rung", record))
        if not pipe.recv():
            raise Stopped

    threading.Thread(target=die_with_parent, daemon=True).start()
    while True:
        job = pipe.recv()
        try:
            answer = "finished", work(job, threads, report)
        except Stopped:
            continue
        except Exception:
            answer = "failed", traceback.format_exc()
        pipe.send(answer)


class OptunaEngine:
    """Optuna, and processes on this machine."""

    def __init__(self, workers: Workers) -> None:
        self.workers = workers
        self.free: SimpleQueue[Worker] = SimpleQueue()

    def __enter__(self) -> OptunaEngine:
        for _ in range(self.workers.number):
            self.free.put(Worker(self.workers.threads))
        return self

    def __exit__(self, *error: object) -> None:
        while not self.free.empty():
            self.free.get().close()

    def run(self, jobs: Sequence[Job], tell: Callable[[Job, Record], None]) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        rungs = jobs[0].plan.rungs if jobs[0].stoppable else []
        pruner = optuna.pruners.SuccessiveHalvingPruner(rungs[0], REDUCTION) if rungs else optuna.pruners.NopPruner()
        study = optuna.create_study(pruner=pruner, direction="maximize")
        lock = threading.Lock()

        def objective(trial: optuna.Trial) -> float:
            job = jobs[trial.suggest_int("job", 0, len(jobs) - 1)]
            last: Record = {}
            reported: set[int] = set()

            def goes_on(record: Record) -> bool:
                last.update(record)
                if record["epochs_done"] not in reported:  # one that goes on after a kill tells again
                    reported.add(record["epochs_done"])
                    trial.report(record["accuracy"], record["epochs_done"])
                return not trial.should_prune()

            record = self.train(job, goes_on)
            with lock:
                tell(job, record or last)
            if record is None:
                raise optuna.TrialPruned
            return record["accuracy"]

        for number in range(len(jobs)):
            study.enqueue_trial({"job": number})
        study.optimize(objective, n_trials=len(jobs), n_jobs=self.workers.number)

    def train(self, job: Job, goes_on: Callable[[Record], bool]) -> Record | None:
        """Have a worker do a job; nothing if it is stopped early."""
        for _ in range(KILLS + 1):
            worker = self.free.get()
            try:
                worker.pipe.send(job)
                while True:
                    what, answer = worker.pipe.recv()
                    if what == "failed":
                        raise RuntimeError(answer)
                    if what == "finished":
                        return answer
                    go = goes_on(answer)
                    worker.pipe.send(go)
                    if not go:
                        return None
            except (EOFError, ConnectionError):
                worker.close()
                worker = Worker(self.workers.threads)
            finally:
                self.free.put(worker)
        raise RuntimeError(f"The process of a training was killed {KILLS + 1} times: {job.trial}.")


ENGINES: dict[str, Callable[[Workers], AbstractContextManager[Engine]]] = {"ray": RayEngine, "optuna": OptunaEngine}


def start(name: str | None, workers: Workers) -> AbstractContextManager[Engine | None]:
    """The engine of that name, or none, to be entered.

    Raises:
        ImportError: It is not installed.
    """
    if name is None:
        return nullcontext()
    if importlib.util.find_spec(name) is None:
        raise ImportError(f"engine={name!r} needs a package that is not installed: pip install '.[search]'.")
    return ENGINES[name](workers)
