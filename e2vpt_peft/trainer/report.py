"""What a search found, told: a sentence, the log, the output of `train`, files, the model card."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.trainer_utils import TrainOutput

from ..utils.files import write_atomically
from .candidates import Candidate
from .config import PruningConfig
from .search import SearchResult

RESULTS, PLOT = "pruning_results.json", "pruning_results.png"
TABLE, MESSAGE = "pruning_candidates", "pruning_message"
"""The rows of all candidates and the sentence about them, among the metrics of `train`."""


@dataclass(frozen=True)
class SearchReport:
    """A finished search in words and numbers.

    Args:
        result ([`SearchResult`]): What it found.
        metric (`str`): The name of the metric that decided.
        tolerance (`float`): By how much that was allowed to be worse than unpruned.
    """

    result: SearchResult
    metric: str
    tolerance: float

    @property
    def message(self) -> str:
        """What was kept, and how good it is, in a sentence."""
        reference, best = self.result.reference, self.result.best
        metric = f"{self.metric}={best.metric:.6g}"
        if not self.result.has_pruned:
            return (
                f"Nothing was pruned: no candidate came within tolerance={self.tolerance:g} of the unpruned adapter's "
                f"{metric}."
            )
        return (
            f"Kept {best.masks.num_tokens} of {reference.masks.num_tokens} visual prompts and {best.parameters:,} of "
            f"{reference.parameters:,} parameters ({best.name}): {metric}, unpruned {reference.metric:.6g}."
        )

    @property
    def rows(self) -> list[dict[str, object]]:
        """The table of candidates, the unpruned adapter first."""
        return [candidate.row() for candidate in [self.result.reference, *self.result.candidates]]

    @property
    def epochs(self) -> float:
        """Those of all phases."""
        return sum(outcome.epochs for outcome in self.result.outcomes.values())

    def output(self, runtime: float) -> TrainOutput:
        """What `train` returns.

        Args:
            runtime (`float`): How long it took, in seconds.
        """
        reference, best, outcomes = self.result.reference, self.result.best, self.result.outcomes
        train_loss = outcomes[self.result.final_phase].train_loss
        metrics: dict[str, Any] = {
            "train_runtime": round(runtime, 4),
            "train_loss": train_loss,
            "pruning_metric": best.metric,
            "pruning_metric_unpruned": reference.metric,
            "pruning_visual_prompts": best.masks.num_tokens,
            "pruning_parameters": best.parameters,
            "pruning_epochs": self.epochs,
            MESSAGE: self.message,
            TABLE: self.rows,
        }
        return TrainOutput(sum(outcome.steps for outcome in outcomes.values()), train_loss, metrics)

    def log_entry(self) -> dict[str, Any]:
        """What is logged at the end."""
        return {**log_entry("done", self.result.best, self.metric), "message": self.message}

    def write(self, folder: Path) -> None:
        """Write the results into a folder, and plot them if matplotlib is installed."""
        results = {
            "message": self.message,
            "metric": self.metric,
            "best": self.result.best.name,
            "final_phase": self.result.final_phase,
            "epochs": self.epochs,
            "candidates": self.rows,
        }
        write_atomically(folder / RESULTS, json.dumps(results, indent=2).encode())
        if importlib.util.find_spec("matplotlib") is not None:
            from ..plots import plot_candidates

            plot_candidates(results).savefig(folder / PLOT, dpi=150)


def log_entry(phase: str, candidate: Candidate, metric: str) -> dict[str, Any]:
    """What is logged of a phase: what the candidate keeps, and how good it is."""
    return {
        "phase": phase,
        "visual_prompts": candidate.masks.num_tokens,
        "segments": candidate.masks.num_segments,
        "parameters": candidate.parameters,
        metric: candidate.metric,
    }


def card_paragraph(config: PruningConfig, message: str) -> str:
    """The paragraph of the model card: how was searched, and the message of the report."""
    tokens, segments = (
        ", ".join(f"{rate:g}" for rate in rates) for rates in (config.token_rates, config.segment_rates)
    )
    return (
        f"Prompts were scored by their importance `{config.importance}` and pruned at rates of {tokens} (visual "
        f"prompts) and {segments} (segments); each candidate was rewound and trained again (`{config.search}` "
        f"search). {message}"
    )


def printable(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics of `train` to be printed in columns: the table as the number of its rows, and without the sentence."""
    shown = {name: value for name, value in metrics.items() if name != MESSAGE}
    return {**shown, TABLE: f"{len(metrics[TABLE])} rows, in {RESULTS}"} if TABLE in metrics else shown
