"""The ways to prune an adapter: which there are, how many are trained for how long, and which one wins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..adapter import PromptedAdapter
from ..masks import PromptMasks
from ..pruning import PromptScores
from ..pruning.prune import least_segments
from .config import PruningConfig


@dataclass(frozen=True)
class Outcome:
    """What a training came to.

    Attributes:
        metric (`float`): The validation metric; NaN if the training was given up.
        epochs (`float`): How long it was.
        steps (`int`): The same, in updates.
        train_loss (`float`): The mean loss of all its batches.
        batch_size (`int`, *optional*): What `auto_find_batch_size` has found.
    """

    metric: float
    epochs: float
    steps: int
    train_loss: float
    batch_size: int | None = None


@dataclass
class Candidate:
    """One way to prune: all the rates that come to the same prompts, and how well it did."""

    name: str
    masks: PromptMasks
    parameters: int
    """Of the prompts, without the head."""
    rates: list[tuple[float, float]] = field(default_factory=list)
    metric: float | None = None
    epochs: float = 0.0
    """Spent on it in all rounds."""
    phase: str | None = None
    """The last one in which it was trained."""

    def add(self, phase: str, outcome: Outcome) -> None:
        """Take the metric of another training, and count its epochs."""
        self.metric, self.phase = outcome.metric, phase
        self.epochs += outcome.epochs

    def row(self) -> dict[str, object]:
        """Its line in the table of results."""
        return {
            "name": self.name,
            "rates": [list(pair) for pair in self.rates],
            "tokens": self.masks.num_tokens,
            "segments": self.masks.num_segments,
            "parameters": self.parameters,
            "metric": self.metric,
            "epochs": self.epochs,
            "phase": self.phase,
        }


def list_candidates(
    adapter: PromptedAdapter, scores: PromptScores, config: PruningConfig
) -> tuple[Candidate, list[Candidate]]:
    """The unpruned adapter and every different way to prune it, in the order of the rates. Nothing is changed."""
    least = least_segments(adapter.config.num_segments) if config.min_segments is None else config.min_segments
    found: dict[PromptMasks, Candidate] = {}
    pairs = [(0.0, 0.0)] + [(token, segment) for token in config.token_rates for segment in config.segment_rates]
    for rates in dict.fromkeys(pairs):
        masks = adapter.masks.prune(scores, rates, (config.min_tokens, least))
        name = f"candidate-{len(found)}" if found else "unpruned"
        found.setdefault(masks, Candidate(name, masks, adapter.num_parameters(masks))).rates.append(rates)
    reference, *candidates = found.values()
    return reference, candidates


def plan_rounds(config: PruningConfig, candidates: int, full: float) -> list[tuple[int, float]]:
    """How many candidates are trained in each round, and for how many epochs (or steps).

    Args:
        config ([`PruningConfig`]): The search.
        candidates (`int`): How many there are.
        full (`float`): The epochs of a full training, which those of the last round get.

    Example:

        ```py
        >>> plan_rounds(PruningConfig(search="halving"), 81, 100)
        [(81, 4), (27, 11), (9, 33), (3, 100)]
        ```
    """
    if config.search == "grid" or candidates <= 1:
        return [(candidates, full)]
    shares = [config.halving_factor**power for power in range(config.halving_rounds)]
    # Rounds that would be of the same length are one round.
    lengths = sorted({full} | {min(full, max(1, round(full / share))) for share in shares[1:]})
    return [(math.ceil(candidates / share), length) for share, length in zip(shares, lengths)]


def survivors(candidates: Sequence[Candidate], count: int, greater_is_better: bool) -> list[Candidate]:
    """The best of a round go on to the next. If all do, they keep their order."""
    return list(candidates) if count == len(candidates) else ranked(candidates, greater_is_better)[:count]


def ranked(candidates: Sequence[Candidate], greater_is_better: bool) -> list[Candidate]:
    """The best first; ties go to the sparser one, then to the lower rates."""
    order = {id(candidate): index for index, candidate in enumerate(candidates)}
    return sorted(candidates, key=lambda c: (-_goodness(c.metric, greater_is_better), c.parameters, order[id(c)]))


def choose(
    reference: Candidate, candidates: Sequence[Candidate], greater_is_better: bool, tolerance: float
) -> Candidate:
    """The best candidate that is worse than the unpruned adapter by at most `tolerance`, or that adapter itself."""
    least = _goodness(reference.metric, greater_is_better) - tolerance
    # A candidate without a finite metric is no choice, even if the unpruned adapter has none either.
    good = [c for c in candidates if -math.inf < _goodness(c.metric, greater_is_better) >= least]
    return ranked(good, greater_is_better)[0] if good else reference


def _goodness(metric: float | None, greater_is_better: bool) -> float:
    if metric is None or math.isnan(metric):
        return -math.inf
    return metric if greater_is_better else -metric
