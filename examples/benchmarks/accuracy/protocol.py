"""What to train, and on what: the search on the validation images, then once for each seed on all."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from datasets import ClassLabel
from quickstart import HEAD, QuickstartArguments, load_backbone
from torch import nn
from transformers import AutoConfig, AutoImageProcessor

from e2vpt_peft import PromptScores, prune_prompts, rewind_prompts, score_prompts

from .images import Images, Splits, load
from .methods import Method, Pruning
from .records import Record, Store
from .tasks import PAPER, Task
from .training import (
    Identity,
    Optimisation,
    Preprocessing,
    Probe,
    accuracy,
    batches,
    features,
    precision,
    train,
)

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
    """

    optimizer: str
    factors: tuple[float, ...]
    learning_rates: tuple[float, ...]
    weight_decays: tuple[float, ...]
    rates: tuple[Rates, ...]
    unpruned: bool

    def trials(self, method: Method, batch_size: int) -> list[tuple[float, float]]:
        """Learning rates and weight decays to try, the smallest learning rate first."""
        own = [method.learning_rate * factor for factor in self.factors]
        rates = sorted([*own, *(rate * batch_size / 256 for rate in self.learning_rates)])
        return [(float(f"{rate:.6g}"), decay) for rate in rates for decay in self.weight_decays]


RECIPES = {
    "quick": Recipe(
        "adamw", (0.1, 0.3, 1, 3, 10), (), (1e-4,), tuple((t, s) for t in (0.3, 0.6) for s in (0.0, 0.5)), True
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
    """What all trainings of a comparison have in common."""

    model: str
    data_dir: str | None
    recipe: str
    epochs: int
    batch_size: int
    seeds: tuple[int, ...]
    device: str

    @property
    def settings(self) -> dict[str, Any]:
        """What tells its results from those of another plan."""
        return {
            "model": self.model, "recipe": self.recipe, "epochs": self.epochs, "batch_size": self.batch_size
        }  # fmt: skip


class Bench:
    """One task: its images on the device, and trainings on them."""

    def __init__(self, task: Task, plan: Plan, store: Store) -> None:
        self.task, self.plan, self.store = task, plan, store
        self.recipe = RECIPES[plan.recipe]
        self.device = torch.device(plan.device)
        self.tuned: dict[tuple[str, str, Optimisation], dict[str, torch.Tensor]] = {}

    @cached_property
    def preprocessing(self) -> Preprocessing:
        processor = AutoImageProcessor.from_pretrained(self.plan.model)
        mean, deviation = IMAGENET if self.task.imagenet_colours else (processor.image_mean, processor.image_std)
        size = AutoConfig.from_pretrained(self.plan.model).image_size
        as_tensor = [torch.tensor(values, device=self.device).view(1, 3, 1, 1) for values in (mean, deviation)]
        return Preprocessing(size, *as_tensor)

    @cached_property
    def splits(self) -> Splits:
        return load(self.task, self.plan.data_dir, self.preprocessing.size).to(self.device)

    @cached_property
    def cached_features(self) -> Splits:
        """The features of all images. The backbone does not depend on the seed, its head does."""
        model, splits = self.build_backbone(0), self.splits
        parts = (features(model, s, self.preprocessing) for s in (splits.train, splits.validation, splits.test))
        train_part, validation, test = parts
        both = features(model, splits.both, self.preprocessing)
        return Splits(train_part, validation, both, test, splits.classes)

    def build_backbone(self, seed: int) -> Any:
        """The backbone, with a head that depends on the seed."""
        names = ClassLabel(num_classes=self.splits.classes)
        return load_backbone(QuickstartArguments(model=self.plan.model), names, seed).to(self.device)

    def build(self, method: Method, seed: int) -> nn.Module:
        return method.adapt(self.build_backbone(seed), self.task).to(self.device)

    def run(self, method: Method) -> list[Record]:
        """Search, then the final trainings: one record for each seed."""
        learning_rate, decay = self.search(method)
        rates = self.search_rates(method, learning_rate, decay) if method.pruning else None
        return [self.once(method, "test", learning_rate, decay, seed, rates) for seed in self.plan.seeds]

    def search(self, method: Method) -> tuple[float, float]:
        """The learning rate and weight decay that validate best, the first of them if several do."""
        trials = self.recipe.trials(method, self.plan.batch_size)
        seed = self.plan.seeds[0]
        return max(trials, key=lambda trial: self.once(method, "validation", *trial, seed, None)["accuracy"])

    def search_rates(self, method: Method, learning_rate: float, decay: float) -> Rates:
        """The rates of pruning that validate best, of several that do those that prune most."""
        assert method.pruning is not None
        seed, trial = self.plan.seeds[0], (learning_rate, decay)
        candidates = sorted(
            {(t * method.pruning.tokens, s * method.pruning.segments) for t, s in self.recipe.rates} - {(0.0, 0.0)}
        )
        records = [self.once(method, "validation", *trial, seed, rates) for rates in candidates]
        accuracies = [record["accuracy"] for record in records]
        fewest = min(r["trainable"] for r in records if r["accuracy"] == max(accuracies))
        best = next(
            rates
            for rates, r in zip(candidates, records)
            if r["accuracy"] == max(accuracies) and r["trainable"] == fewest
        )
        unpruned = self.once(method, "validation", *trial, seed, None)["accuracy"]
        return (0.0, 0.0) if self.recipe.unpruned and unpruned > max(accuracies) else best

    def once(
        self, method: Method, part: str, learning_rate: float, decay: float, seed: int, rates: Rates | None
    ) -> Record:
        """One training and its accuracy, unless the store has it."""
        settings = {
            "task": self.task.name,
            "group": self.task.group,
            "method": method.searched_as if part == "validation" and rates is None else method.name,
            "part": part,
            "learning_rate": learning_rate,
            "weight_decay": decay,
            "rates": None if rates is None else list(rates),
            "seed": seed,
            **self.plan.settings,
        }
        how = Optimisation(self.recipe.optimizer, learning_rate, decay, self.plan.epochs, self.plan.batch_size, seed)
        return self.store.once(settings, lambda: self.measure(method, part, how, rates))

    def measure(self, method: Method, part: str, how: Optimisation, rates: Rates | None) -> Record:
        """Train, prune and train again if there are rates, and evaluate."""
        start = time.perf_counter()
        splits = self.cached_features if method.cached else self.splits
        preprocessing = Identity() if method.cached else self.preprocessing
        trained_on, judged_on = (
            (splits.train, splits.validation) if part == "validation" else (splits.both, splits.test)
        )
        model = self.build(method, how.seed)
        total = sum(p.numel() for p in model.parameters())
        if method.cached:
            model = Probe(model.get_submodule(HEAD))
        if method.pruning is None:
            train(model, trained_on, preprocessing, how)
        else:
            self.tune(model, (method.searched_as, part, how), trained_on)
        if rates is not None and rates != (0.0, 0.0):
            assert method.pruning is not None
            self.prune(model, method.pruning, rates, trained_on)
            train(model, trained_on, preprocessing, how)
        return {
            "accuracy": accuracy(model, judged_on, preprocessing),
            "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "head": sum(p.numel() for p in head_of(model)),
            "total": total,
            "seconds": round(time.perf_counter() - start, 3),
            "hardware": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU",
            "torch": torch.__version__,
        }

    def tune(self, model: nn.Module, training: tuple[str, str, Optimisation], images: Images) -> None:
        """The training before pruning, once for all the candidates and variants that start from it."""
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if training not in self.tuned:
            train(model, images, self.preprocessing, training[-1])
            self.tuned[training] = {name: p.detach().clone() for name, p in trainable.items()}
        with torch.no_grad():
            for name, value in self.tuned[training].items():
                trainable[name].copy_(value)

    def prune(self, model: nn.Module, pruning: Pruning, rates: Rates, images: Images) -> None:
        """Score on the images that the prompts were trained on, prune, and rewind."""
        with precision(self.device):
            scores: PromptScores = score_prompts(
                model, list(batches(images, self.preprocessing)), pruning.importance, progress_bar=False
            )
        prune_prompts(model, scores, token_rate=rates[0], segment_rate=rates[1])
        if pruning.rewind:
            rewind_prompts(model)


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
