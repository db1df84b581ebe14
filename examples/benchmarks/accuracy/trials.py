"""One training of one method on one task: from images to a record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoImageProcessor

from e2vpt_peft import PromptScores, prune_prompts, rewind_prompts, score_prompts
from examples.data_and_backbone import HEAD

from .backbones import build
from .checkpoints import Checkpoints, Clock, History, Progress
from .images import Images, Splits, load
from .methods import Method, Pruning
from .recipes import Plan, Rates
from .records import Record
from .shares import IMAGES, shares_of_prefix
from .steps import StepMaker, autocast
from .tasks import Task
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

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


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
        step_of: StepMaker | None = None,
    ) -> Record:
        """Train, prune and train again if there are rates, and evaluate.

        Args:
            method, part, how, rates: See [`Trial`].
            report (`Callable`, *optional*): Told the accuracy at each rung of the plan, as a record of a training that
                was stopped there. May raise to stop it. Of a training that prunes, what comes after that counts.
            step_of (`Callable`, *optional*): See [`training.train`].
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
        train(model, trained_on, preprocessing, how, progress, step_of)
        if pruned:
            assert method.pruning is not None and rates is not None
            self.prune(model, method.pruning, rates, trained_on, first)
            progress = Progress(self.checkpoints, self.settings(trial), clock, **judged)
            train(model, trained_on, preprocessing, how, progress, step_of)
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
                scored_on = list(batches(images[: pruning.images], self.preprocessing))
                scores = score_prompts(model, scored_on, pruning.importance, progress_bar=False)
            if self.checkpoints:
                self.checkpoints.write(settings, vars(scores))
        prune_prompts(model, scores, token_rate=rates[0], segment_rate=rates[1])
        if pruning.rewind:
            rewind_prompts(model)


def head_of(model: nn.Module) -> list[nn.Parameter]:
    """The trainable parameters of the head, which every method has."""
    if isinstance(model, Probe):
        return list(model.parameters())
    return [p for name, p in model.named_parameters() if p.requires_grad and HEAD in name]
