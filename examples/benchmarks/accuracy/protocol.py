"""What to train, and on what: the search on the validation images, then once for each seed on all."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from random import Random
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from transformers import AutoConfig, AutoImageProcessor

from e2vpt_peft import PromptScores, prune_prompts, rewind_prompts, score_prompts
from examples.data_and_backbone import HEAD

from .backbones import build
from .checkpoints import Checkpoints, Clock, History, Progress
from .images import Images, Splits, load
from .methods import Method, Pruning
from .records import PLAN, Record, Store
from .shares import IMAGES, shares_of_prefix
from .steps import autocast
from .tasks import PAPER, Task
from .training import (
    Identity,
    Optimisation,
    Preprocessing,
    Probe,
    accuracy,
    batches,
    features,
    train,
)

REDUCTION = 3
"""At each rung of a search, about one training in so many goes on."""

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])

Rates = tuple[float, float]
"""Shares of visual prompts, and of their segments, to prune."""


@dataclass(frozen=True)
class Recipe:
    """Optimiser, and what is searched. Every method gets the same number of trials.

    Attributes:
        optimizer (`str`): As in [`training.Optimisation`].
        factors (`tuple[float]`): Learning rates, as multiples of the method's own.
        learning_rates (`tuple[float]`): Or learning rates for 256 images a step, the same for all methods.
        weight_decays (`tuple[float]`): Weight decays.
        rates (`tuple[Rates]`): What to try to prune.
        unpruned (`bool`): Whether nothing is pruned if every candidate validates worse than the unpruned adapter.
        lengths (`tuple[float]`): Successive halving: the trainings of the search have this part of all epochs, and
            the better third of them is trained anew for the next.
        own_colours (`bool`): Whether to normalise as the backbone was pretrained, whatever the task asks for.
    """

    optimizer: str
    factors: tuple[float, ...]
    learning_rates: tuple[float, ...]
    weight_decays: tuple[float, ...]
    rates: tuple[Rates, ...]
    unpruned: bool
    lengths: tuple[float, ...] = (1.0,)
    own_colours: bool = False

    def trials(self, method: Method, batch_size: int) -> list[tuple[Method, float, float]]:
        """Learning rates and weight decays to try, the smallest learning rate first.

        A method with variants has as many trials as the others: the first of two variants gets every other rate,
        beginning with the smallest, the second those between.
        """
        own = [method.learning_rate * factor for factor in self.factors]
        rates = sorted([*own, *(rate * batch_size / 256 for rate in self.learning_rates)])
        pairs = [(float(f"{rate:.6g}"), decay) for rate in rates for decay in self.weight_decays]
        variants = method.each_variant()
        return [(variants[index % len(variants)], *pair) for index, pair in enumerate(pairs)]


RECIPES = {
    "quick": Recipe(
        "adamw", (0.1, 0.3, 1, 3, 10), (), (1e-4,), tuple((t, s) for t in (0.3, 0.6) for s in (0.0, 0.5)), True
    ),
    "modern": Recipe(
        "adamw",
        (0.03, 0.1, 0.3, 1, 3, 10),
        (),
        (1e-4,),
        tuple((t, s) for t in (0.3, 0.6) for s in (0.0, 0.5)),
        True,
        lengths=(0.5, 1.0),  # after a quarter, prompts were near chance at rates that are good for them
        own_colours=True,
    ),
    "paper": Recipe(
        "sgd",
        (),
        tuple(PAPER["grid"]["base_learning_rate"]),
        tuple(PAPER["grid"]["weight_decay"]),
        tuple((t, s) for t in PAPER["pruning"]["token_rates"] for s in PAPER["pruning"]["segment_rates"]),
        False,
    ),
}


@dataclass(frozen=True)
class Plan:
    """What all trainings of a comparison have in common.

    Attributes:
        model, data_dir, recipe, epochs, batch_size, seeds, device, grace_epochs, image_size, attention:
            Options of `compare.py`.
        precision (`str`): One of [`steps.PRECISIONS`].
        factors (`tuple[float]`): In place of the recipe's.
        search_epochs (`tuple[int]`): In place of those that the recipe's lengths come to.
    """

    model: str
    data_dir: str | None
    recipe: str
    epochs: int
    batch_size: int
    seeds: tuple[int, ...]
    device: str
    grace_epochs: int | None = None
    image_size: int | None = None
    precision: str = "float32"
    attention: str | None = None
    factors: tuple[float, ...] = ()
    search_epochs: tuple[int, ...] = ()

    @property
    def protocol(self) -> Recipe:
        """The recipe, with what replaces parts of it."""
        recipe = RECIPES[self.recipe]
        return replace(recipe, factors=self.factors) if self.factors else recipe

    @property
    def lengths(self) -> list[int]:
        """The epochs of the trainings of a search, rung by rung."""
        of_recipe = {max(1, round(part * self.epochs)) for part in self.protocol.lengths}
        return sorted(self.search_epochs or of_recipe)

    @property
    def rungs(self) -> list[int]:
        """The epochs after which a poor training may be stopped early."""
        if self.grace_epochs is None:
            return []
        powers = range(self.epochs.bit_length())
        return [rung for power in powers if (rung := self.grace_epochs * REDUCTION**power) < self.epochs]

    @property
    def settings(self) -> dict[str, Any]:
        """What tells its results from those of another plan."""
        return {name: getattr(self, name) for name in PLAN}


class Trial(NamedTuple):
    """One training: of what, on which part of the images, how, what is pruned, and for how long."""

    method: Method
    part: str
    learning_rate: float
    weight_decay: float
    seed: int
    rates: Rates | None
    epochs: int


@dataclass(frozen=True)
class Job:
    """A training as it is given to another process.

    Attributes:
        task, plan, trial: What to train.
        checkpoints (`str`): The folder for its state.
        checkpoint_seconds (`float`): How often it is written.
        shared (`bool`): Whether trainings that prune go on from where this one ends.
        stoppable (`bool`): Whether it may be stopped early.
        known (`Record`, *optional*): What became of it already. Then it only reports again what it reported once, so
            that it counts where others are judged by it.
    """

    task: Task
    plan: Plan
    trial: Trial
    checkpoints: str
    checkpoint_seconds: float
    shared: bool
    stoppable: bool
    known: Record | None = None


class Engine(Protocol):
    """Does trainings in other processes."""

    def run(self, jobs: Sequence[Job], tell: Callable[[Job, Record], None]) -> None:
        """Do all jobs.

        Args:
            jobs (`Sequence[Job]`): What to do.
            tell (`Callable`): Called in this process, as soon as a training is finished or stopped. `epochs_done` is
                in the record of one that was stopped.
        """


class Trainings:
    """One task: its images on the device, and trainings on them.

    Args:
        task, plan: What to train on, and how.
        checkpoints ([`Checkpoints`], *optional*): Where trainings that are not finished are kept.
        shared (`bool`): Whether to keep those that are finished, too, until the folder is cleared: then the many
            trainings that differ in what they prune train once until there.
    """

    def __init__(self, task: Task, plan: Plan, checkpoints: Checkpoints | None = None, shared: bool = False) -> None:
        self.task, self.plan, self.checkpoints, self.shared = task, plan, checkpoints, shared
        self.recipe = plan.protocol
        self.device = torch.device(plan.device)

    @cached_property
    def preprocessing(self) -> Preprocessing:
        processor = AutoImageProcessor.from_pretrained(self.plan.model)
        imagenet = self.task.imagenet_colours and not self.recipe.own_colours
        mean, deviation = IMAGENET if imagenet else (processor.image_mean, processor.image_std)
        size = self.plan.image_size or AutoConfig.from_pretrained(self.plan.model).image_size
        as_tensor = [torch.tensor(values, device=self.device).view(1, 3, 1, 1) for values in (mean, deviation)]
        return Preprocessing(size, *as_tensor)

    @cached_property
    def splits(self) -> Splits:
        return load(self.task, self.plan.data_dir, self.preprocessing.size).to(self.device)

    @cached_property
    def cached_features(self) -> Splits:
        """The features of all images. The backbone does not depend on the seed, its head does."""
        model, splits = self.build_backbone(0), self.splits
        both, test = (features(model, s, self.preprocessing, self.plan.precision) for s in (splits.both, splits.test))
        middle = len(splits.train)
        return Splits(both[:middle], both[middle:], both, test, splits.classes)

    def build_backbone(self, seed: int) -> Any:
        """The backbone, with a head that depends on the seed."""
        plan = self.plan
        return build(plan.model, self.splits.classes, seed, plan.image_size, plan.attention).to(self.device)

    def build(self, method: Method, seed: int) -> nn.Module:
        return method.adapt(self.build_backbone(seed), self.task).to(self.device)

    def settings(self, trial: Trial) -> dict[str, Any]:
        """What tells one training from another."""
        method, part, learning_rate, decay, seed, rates, epochs = trial
        return {
            "task": self.task.name,
            "group": self.task.group,
            "method": method.searched_as if part == "validation" and rates is None else method.name,
            "part": part,
            "learning_rate": learning_rate,
            "weight_decay": decay,
            "rates": None if rates is None else list(rates),
            "seed": seed,
            "variant": method.variant,
            "length": epochs,
            **self.plan.settings,
        }

    def optimisation(self, trial: Trial) -> Optimisation:
        return Optimisation(
            self.recipe.optimizer,
            trial.learning_rate,
            trial.weight_decay,
            trial.epochs,
            self.plan.batch_size,
            trial.seed,
            self.plan.precision,
            trial.method.kv_lr_ratio,
        )

    def measure(
        self,
        method: Method,
        part: str,
        how: Optimisation,
        rates: Rates | None,
        report: Callable[[Record], None] | None = None,
    ) -> Record:
        """Train, prune and train again if there are rates, and evaluate.

        Args:
            method, part, how, rates: See [`Trial`].
            report (`Callable`, *optional*): Told the accuracy at each rung of the plan, as a record of a training that
                was stopped there. May raise to stop it. Of a training that prunes, what comes after that counts.
        """
        clock = Clock()
        splits = self.cached_features if method.cached else self.splits
        preprocessing = Identity() if method.cached else self.preprocessing
        trained_on, judged_on = (
            (splits.train, splits.validation) if part == "validation" else (splits.both, splits.test)
        )
        model = self.build(method, how.seed)
        total = sum(p.numel() for p in model.parameters())
        looked_at = preprocessing.for_evaluation(judged_on.pixels[:IMAGES])
        at_start = None if part == "validation" else shares_of_prefix(model, looked_at)
        if method.cached:
            model = Probe(model.get_submodule(HEAD))
        machine = {
            "hardware": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU",
            "torch": torch.__version__,
        }

        def tell(history: History) -> None:
            assert report is not None
            epoch, found = history[-1]
            seconds = round(clock.seconds, 3)
            report({"accuracy": found, "epochs_done": epoch, "history": history, "seconds": seconds, **machine})

        judged: dict[str, Any] = {}
        if report:
            judged = {"rungs": self.plan.rungs, "report": tell}
            judged["judge"] = lambda model: accuracy(model, judged_on, preprocessing, how.precision)
        trial = Trial(method, part, how.learning_rate, how.weight_decay, how.seed, rates, how.epochs)
        first = {**self.settings(trial), "method": method.searched_as, "rates": None}
        pruned = rates is not None and rates != (0.0, 0.0)
        progress = Progress(self.checkpoints, first, clock, self.shared, **({} if pruned else judged))
        train(model, trained_on, preprocessing, how, progress)
        if pruned:
            assert method.pruning is not None and rates is not None
            self.prune(model, method.pruning, rates, trained_on, first)
            progress = Progress(self.checkpoints, self.settings(trial), clock, **judged)
            train(model, trained_on, preprocessing, how, progress)
        fit = (
            {}
            if part == "validation"
            else {"training_accuracy": accuracy(model, trained_on, preprocessing, how.precision)}
        )
        return {
            "accuracy": accuracy(model, judged_on, preprocessing, how.precision),
            **fit,
            **({} if at_start is None else {"shares": {"start": at_start, "end": shares_of_prefix(model, looked_at)}}),
            "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "head": sum(p.numel() for p in head_of(model)),
            "total": total,
            "seconds": round(clock.seconds, 3),
            **machine,
            **({"history": progress.history} if progress.history else {}),
        }

    def prune(self, model: nn.Module, pruning: Pruning, rates: Rates, images: Images, trained: dict[str, Any]) -> None:
        """Score on the images that the prompts were trained on, prune, and rewind.

        The scores are kept with the training that they are of: they serve all rates, and a training that goes on after
        a kill has to prune what it pruned before.
        """
        settings = {**trained, "scores": pruning.importance}
        if self.checkpoints and (kept := self.checkpoints.read(settings)):
            scores = PromptScores(**kept)
        else:
            with autocast(self.device, self.plan.precision):
                scores = score_prompts(
                    model, list(batches(images, self.preprocessing)), pruning.importance, progress_bar=False
                )
            if self.checkpoints:
                self.checkpoints.write(settings, vars(scores))
        prune_prompts(model, scores, token_rate=rates[0], segment_rate=rates[1])
        if pruning.rewind:
            rewind_prompts(model)


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


def head_of(model: nn.Module) -> list[nn.Parameter]:
    """The trainable parameters of the head, which every method has."""
    if isinstance(model, Probe):
        return list(model.parameters())
    return [p for name, p in model.named_parameters() if p.requires_grad and HEAD in name]


def split_work(cells: Sequence[Any], shard: tuple[int, int]) -> list[Any]:
    """The cells of the `i`-th of `n` machines, counted from 0: every `n`-th, so that each has some of every task."""
    index, number = shard
    if not 0 <= index < number:
        raise ValueError(f"shard={index}/{number} must be from 0/{number} to {number - 1}/{number}.")
    return list(cells[index::number])
