"""What [`E2VPTTrainer`] searches, and by which measure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Optional

from transformers import TrainingArguments

from ..pruning import SCORING_METHODS
from ..utils.fields import check_choice, check_integer, check_type, is_number


def _default_rates() -> list[float]:
    return [tenth / 10 for tenth in range(1, 10)]


@dataclass
class PruningArguments:
    """[`PruningConfig`] without the metric, to be parsed by `HfArgumentParser` together with `TrainingArguments`.

    `TrainingArguments` have fields for the metric, and a parser takes every name once only. [`E2VPTTrainer`] takes
    this as it takes a [`PruningConfig`], and decides by the metric of the `TrainingArguments`.
    """

    token_rates: list[float] = field(
        default_factory=_default_rates,
        metadata={"help": "Shares of visual prompts to try to prune, in [0, 1)."},
    )
    segment_rates: list[float] = field(
        default_factory=_default_rates,
        metadata={"help": "Shares of the segments of the visual prompts left to try to prune, in [0, 1)."},
    )
    importance: str = field(
        default="removal",
        metadata={"help": f"How prompts are scored: one of {', '.join(SCORING_METHODS)}."},
    )
    search: str = field(
        default="grid",
        metadata={"help": "'grid': train every candidate in full. 'halving': few epochs for all, more for the best."},
    )
    tolerance: float = field(
        default=0.0,
        metadata={"help": "By how much the metric may be worse than unpruned; otherwise nothing is pruned."},
    )
    min_tokens: int = field(default=1, metadata={"help": "How many visual prompts stay in any case."})
    min_segments: Optional[int] = field(
        default=None, metadata={"help": "How many segments of each visual prompt stay in any case; default a quarter."}
    )
    max_score_batches: Optional[int] = field(
        default=None, metadata={"help": "Score on at most so many training batches of each process; default all."}
    )
    rewind: str = field(
        default="saved",
        metadata={"help": "'saved': candidates start from the adapter's initial values. 'fresh': from new ones."},
    )
    halving_factor: int = field(
        default=3,
        metadata={"help": "For 'halving': one in so many candidates goes on, with so many times the epochs."},
    )
    halving_rounds: int = field(default=4, metadata={"help": "For 'halving': the number of rounds."})
    skip_diverged: bool = field(
        default=False,
        metadata={"help": "Give up a candidate whose loss is NaN or infinite, in place of stopping the search."},
    )

    def __post_init__(self) -> None:
        for name in ("token_rates", "segment_rates"):
            setattr(self, name, _rates(name, getattr(self, name)))
        check_choice("importance", self.importance, list(SCORING_METHODS))
        check_choice("search", self.search, ["grid", "halving"])
        check_choice("rewind", self.rewind, ["saved", "fresh"])
        if not is_number(self.tolerance):
            raise TypeError(f"tolerance={self.tolerance!r} must be a number, 0 or more.")
        if not 0 <= self.tolerance < float("inf"):
            raise ValueError(f"tolerance={self.tolerance!r} must be 0 or more, in units of the metric.")
        for name in ("min_tokens", "min_segments", "max_score_batches", "halving_rounds"):
            check_integer(name, getattr(self, name), 1, optional=name in ("min_segments", "max_score_batches"))
        check_integer("halving_factor", self.halving_factor, 2)
        check_type("skip_diverged", self.skip_diverged, bool, "True or False")


@dataclass
class PruningConfig(PruningArguments):
    """The search for the prompts to prune, as [`E2VPTTrainer`] runs it.

    The defaults are the paper's search: 10 to 90 % of the visual prompts, and of their segments, every combination
    retrained.

    Args:
        token_rates, segment_rates (`list[float]`):
            The shares of visual prompts, and of the segments of those left, to try to prune, each in [0, 1). Every
            combination is a candidate. Candidates that come to the same prompts are trained once.
        importance (`str`, defaults to `"removal"`): How prompts are scored, see [`score_prompts`].
        search (`"grid"` or `"halving"`, defaults to `"grid"`):
            `"grid"` trains every candidate in full. `"halving"` (successive halving) trains all of them for few
            epochs, the best third of them anew for three times as many, and so on to the full number.
        metric_for_best_model (`str`, *optional*):
            The validation metric that decides, with or without `"eval_"`. Defaults to that of the
            `TrainingArguments`, then to the loss.
        greater_is_better (`bool`, *optional*):
            Whether larger is better. Defaults to that of the `TrainingArguments` if the metric is theirs, else to
            whether the metric's name does not end with `"loss"`.
        tolerance (`float`, defaults to `0.0`):
            By how much the metric may be worse than that of the unpruned adapter. If all candidates are worse than
            that, nothing is pruned.
        min_tokens (`int`, defaults to `1`): How many visual prompts stay in any case.
        min_segments (`int`, *optional*): How many segments of each stay in any case; a quarter by default.
        max_score_batches (`int`, *optional*): Score on at most so many batches of each process. All by default.
        rewind (`"saved"` or `"fresh"`, defaults to `"saved"`):
            Whether candidates start from the initial values of the adapter or from new ones, the same for all, as
            the published code does.
        halving_factor (`int`, defaults to `3`):
            For `"halving"`: one in so many candidates goes on to the next round, with so many times the epochs.
        halving_rounds (`int`, defaults to `4`):
            For `"halving"`: the number of rounds. The first one has `1 / halving_factor ** (halving_rounds - 1)` of
            the epochs, but at least 1.
        skip_diverged (`bool`, defaults to `False`):
            Give up a candidate whose loss becomes NaN or infinite; its metric is NaN then, and it is no choice.
            Otherwise such a loss stops the search, as it does in any case while the adapter is tuned or scored.

    Raises:
        TypeError: A field has the wrong type.
        ValueError:
            A field has a value that is not allowed. The message names the field, the value and what is allowed.

    Example:

        ```py
        >>> from e2vpt_peft import PruningConfig

        >>> config = PruningConfig(token_rates=[0.3, 0.6], segment_rates=[0.0, 0.5], metric_for_best_model="accuracy")
        ```
    """

    metric_for_best_model: Optional[str] = field(
        default=None,
        metadata={"help": "Validation metric that decides. Defaults to that of TrainingArguments, then the loss."},
    )
    greater_is_better: Optional[bool] = field(
        default=None, metadata={"help": "Whether a larger metric is better. Defaults to whether it is no loss."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.metric_for_best_model is not None and not isinstance(self.metric_for_best_model, str):
            raise TypeError(f"metric_for_best_model={self.metric_for_best_model!r} must be the name of a metric.")
        if self.greater_is_better is not None and not isinstance(self.greater_is_better, bool):
            raise TypeError(f"greater_is_better={self.greater_is_better!r} must be True, False or None.")


class Metric(NamedTuple):
    """The validation metric that decides.

    Attributes:
        name (`str`): As an evaluation returns it, with `"eval_"`.
        greater_is_better (`bool`): Whether larger is better.
    """

    name: str
    greater_is_better: bool

    @classmethod
    def of(cls, config: PruningConfig, arguments: TrainingArguments) -> Metric:
        """That of the config, else of the arguments, else the loss."""
        name = config.metric_for_best_model or arguments.metric_for_best_model or "loss"
        greater_is_better = config.greater_is_better
        if greater_is_better is None and name == arguments.metric_for_best_model:
            greater_is_better = arguments.greater_is_better
        if greater_is_better is None:
            greater_is_better = not name.endswith("loss")
        return cls(name if name.startswith("eval_") else f"eval_{name}", greater_is_better)

    def value_in(self, metrics: Mapping[str, float]) -> float:
        """Its value among the metrics of an evaluation.

        Raises:
            ValueError: It is not among them.
            TypeError: It is no number.
        """
        if self.name not in metrics:
            raise ValueError(
                f"metric_for_best_model={self.name!r} is not among the metrics of the evaluation: "
                f"{', '.join(sorted(metrics))}. Name one of them, or return it from compute_metrics."
            )
        value: Any = metrics[self.name]
        try:
            if isinstance(value, str):
                raise TypeError
            return float(value)
        except (TypeError, ValueError, RuntimeError):  # the last: a tensor of several numbers
            raise TypeError(
                f"metric_for_best_model={self.name!r} is {value!r}, of type {type(value).__name__}: compute_metrics "
                "must return a number for it."
            ) from None


def _rates(name: str, value: Any) -> list[float]:
    if not isinstance(value, (list, tuple)) or not all(is_number(rate) for rate in value):
        raise TypeError(f"{name}={value!r} must be a list of numbers in [0, 1).")
    if not value or not all(0 <= rate < 1 for rate in value):
        raise ValueError(
            f"{name}={value!r} must have one or more numbers, all in [0, 1): shares to prune, not percent."
        )
    return sorted({float(rate) for rate in value})
