"""What to train: the search on the validation images, then once for each seed on all."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, Protocol

from .checkpoints import Checkpoints
from .methods import Method
from .recipes import REDUCTION, Plan, Rates
from .records import Record, Store
from .tasks import Task
from .trials import Job, Trainings, Trial


class Engine(Protocol):
    """Does trainings in other processes."""

    def run(self, jobs: Sequence[Job], tell: Callable[[Job, Record], None]) -> None:
        """Do all jobs.

        Args:
            jobs (`Sequence[Job]`): What to do.
            tell (`Callable`): Called in this process, as soon as a training is finished or stopped. `epochs_done` is
                in the record of one that was stopped.
        """


class Bench(Trainings):
    """The protocol on one task.

    Args:
        task, plan, checkpoints, shared: See [`Trainings`].
        store ([`Store`]): The results. What it has is not run again.
        engine ([`Engine`], *optional*): Does several trainings at a time, in other processes.
    """

    def __init__(
        self,
        task: Task,
        plan: Plan,
        store: Store,
        checkpoints: Checkpoints | None = None,
        shared: bool = False,
        engine: Engine | None = None,
    ) -> None:
        super().__init__(task, plan, checkpoints, shared)
        self.store, self.engine = store, engine

    def run(self, method: Method) -> list[Record]:
        """Search, then the final trainings: one record for each seed."""
        best = self.search(method)
        rates = self.search_rates(best) if method.pruning else None
        found = self.train_all([best._replace(part="test", seed=seed, rates=rates) for seed in self.plan.seeds])
        return [record for record in found if record]

    def search(self, method: Method) -> Trial:
        """The training that validates best, the first of them if several do.

        After each of the plan's lengths the better third goes on. The last that is left has the length at which it
        validated best, the shortest of several; all epochs, if that was not among them. Where there is one rate and
        one length, nothing is trained to choose it.
        """
        seed = self.plan.seeds[0]
        running = [
            Trial(variant, "validation", rate, decay, seed, None, self.plan.epochs)
            for variant, rate, decay in self.recipe.trials(method, self.plan.batch_size)
        ]
        if len(running) == 1 and self.plan.lengths == [self.plan.epochs]:
            return running[0]
        for epochs in self.plan.lengths:
            running = [trial._replace(epochs=epochs) for trial in running]
            found = self.train_all(running, stoppable=True)
            judged = [(trial, record["accuracy"]) for trial, record in zip(running, found) if record]
            judged.sort(key=lambda pair: pair[1], reverse=True)
            running = [trial for trial, _ in judged[: math.ceil(len(judged) / REDUCTION)]]
        best = running[0]
        if best.epochs < self.plan.epochs:
            return best._replace(epochs=self.plan.epochs)
        tried = [best._replace(epochs=epochs) for epochs in self.plan.lengths]
        return max(tried, key=lambda trial: self.accuracy_of(trial))

    def accuracy_of(self, trial: Trial) -> float:
        """Of a training that is finished."""
        record = self.store.find(self.settings(trial))
        assert record is not None
        return record["accuracy"]

    def search_rates(self, best: Trial) -> Rates:
        """The rates of pruning that validate best, of several that do those that prune most.

        Args:
            best ([`Trial`]): The training that is pruned.
        """
        pruning = best.method.pruning
        assert pruning is not None
        candidates = sorted({(t * pruning.tokens, s * pruning.segments) for t, s in self.recipe.rates} - {(0.0, 0.0)})
        records = self.train_all([best._replace(rates=rates) for rates in candidates], stoppable=True)
        finished = [(rates, record) for rates, record in zip(candidates, records) if record]
        highest = max(record["accuracy"] for _, record in finished)
        smallest, _ = min(
            ((rates, r["trainable"]) for rates, r in finished if r["accuracy"] == highest), key=lambda pair: pair[1]
        )
        (unpruned,) = self.train_all([best])
        assert unpruned is not None
        return (0.0, 0.0) if self.recipe.unpruned and unpruned["accuracy"] > highest else smallest

    def train_all(self, trials: Sequence[Trial], stoppable: bool = False) -> list[Record | None]:
        """The records of trainings, in their order; none of one that was stopped early."""
        if self.engine is None:
            return [self.once(trial) for trial in trials]
        known = [self.known(trial, stoppable) for trial in trials]
        if not all(known):
            jobs = [self.job(trial, stoppable, record) for trial, record in zip(trials, known)]
            if stoppable and self.plan.rungs:
                # Learning rates are sorted, and were each better than the last, none would be stopped.
                Random(0).shuffle(jobs)
                jobs.sort(key=lambda job: job.known is None)
            else:
                jobs = [job for job in jobs if job.known is None]
            self.engine.run(jobs, self.add)
        return [self.store.find(self.settings(trial)) for trial in trials]

    def known(self, trial: Trial, stoppable: bool) -> Record | None:
        """What became of a training, if anything did."""
        settings = self.settings(trial)
        return self.store.find(settings) or (self.store.find(self.stopped(settings)) if stoppable else None)

    def stopped(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The settings of a training that was stopped early, which no finished one has."""
        return {**settings, "part": "stopped", "grace_epochs": self.plan.grace_epochs}

    def job(self, trial: Trial, stoppable: bool, known: Record | None) -> Job:
        assert self.checkpoints is not None
        folder, seconds = str(self.checkpoints.folder), self.checkpoints.seconds
        return Job(self.task, self.plan, trial, folder, seconds, self.shared, stoppable, known)

    def add(self, job: Job, record: Record) -> None:
        """Write what became of a training."""
        if job.known is None:
            settings = self.settings(job.trial)
            self.store.add(self.stopped(settings) if "epochs_done" in record else settings, record)
            self.forget(job.trial)

    def once(self, trial: Trial) -> Record:
        """One training and its accuracy, unless the store has it."""
        method, part, rates = trial.method, trial.part, trial.rates
        record = self.store.once(
            self.settings(trial), lambda: self.measure(method, part, self.optimisation(trial), rates)
        )
        self.forget(trial)
        return record

    def forget(self, trial: Trial) -> None:
        """Remove the state of a finished training, unless others go on from there."""
        if self.checkpoints and not (self.shared and trial.rates is None):
            self.checkpoints.forget(self.settings(trial))


def split_work(cells: Sequence[Any], shard: tuple[int, int]) -> list[Any]:
    """The cells of the `i`-th of `n` machines, counted from 0: every `n`-th, so that each has some of every task."""
    index, number = shard
    if not 0 <= index < number:
        raise ValueError(f"shard={index}/{number} must be from 0/{number} to {number - 1}/{number}.")
    return list(cells[index::number])
