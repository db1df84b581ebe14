"""How to train and what to search, as data: the recipes, and what all trainings of a comparison have in common."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from .methods import Method
from .records import PLAN
from .tasks import PAPER

REDUCTION = 3
"""At each rung of a search, about one training in so many goes on."""

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
