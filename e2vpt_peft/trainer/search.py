"""The paper's recipe: tune, score, train every candidate from the start, keep the best."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from tqdm.auto import tqdm
from transformers import set_seed

from ..adapter import PromptedAdapter
from ..masks import PromptMasks
from ..pruning import AdapterSnapshot, InitialValues, PromptScores, rewind_prompts
from .candidates import Candidate, Outcome, choose, list_candidates, plan_rounds, survivors
from .config import PruningConfig
from .state import INITIAL, START, SearchState

TUNE, FINAL = "tune", "final"
"""Phases before and after the candidates, whose phases have the names of candidates."""


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        reference ([`Candidate`]): The tuned, unpruned adapter.
        candidates (`Sequence[Candidate]`): All ways to prune it, in the order of the rates.
        best ([`Candidate`]): The one that is left in the model; `reference` if nothing was pruned.
        final_phase (`str`): The phase that its weights are from.
        outcomes (`Mapping[str, Outcome]`): Of all phases, by their names, in the order in which they were trained.
    """

    reference: Candidate
    candidates: Sequence[Candidate]
    best: Candidate
    final_phase: str
    outcomes: Mapping[str, Outcome]

    @property
    def has_pruned(self) -> bool:
        """Whether a candidate was good enough."""
        return self.best is not self.reference


@dataclass(frozen=True)
class Start:
    """Where every training of a search starts.

    Attributes:
        adapter ([`PromptedAdapter`]): The adapter.
        initial ([`InitialValues`]): What rewinding goes back to.
        snapshot ([`AdapterSnapshot`]): The adapter before the search, which may be one that was tuned or pruned.
        fresh_seed (`int`, *optional*): Rewinding draws new values from it, the same for every candidate.
    """

    adapter: PromptedAdapter
    initial: InitialValues
    snapshot: AdapterSnapshot
    fresh_seed: int | None

    def restore(self) -> None:
        """Make the adapter what it was before the search."""
        self.snapshot.restore(self.adapter)
        self.initial.restore(self.adapter)

    def rewind(self, masks: PromptMasks) -> None:
        """Prune the adapter in this way, and take it back to the start."""
        self.restore()
        if self.fresh_seed is not None:
            set_seed(self.fresh_seed)
        init: Literal["saved", "fresh"] = "saved" if self.fresh_seed is None else "fresh"
        rewind_prompts(self.adapter.model, init=init, adapter_name=self.adapter.name)
        self.adapter.set_masks(masks)


@dataclass
class PruningSearch:
    """The search for the prompts to prune.

    It knows neither data nor Trainer: `fit` trains and evaluates the adapter as it finds it, and `score` scores its
    prompts. What is finished stands in `state` and is not done again.

    Args:
        adapter ([`PromptedAdapter`]): The adapter, in a model that is whole between the phases.
        config ([`PruningConfig`]): The search.
        state ([`SearchState`]): Where it stands.
        fit (`Callable[[str, float], Outcome]`): Takes the name of a phase, and its length.
        score (`Callable[[], PromptScores]`): Scores the tuned adapter.
        log (`Callable[[str, Candidate], None]`): Is told the phase that is finished, and of which candidate it was.
        length (`float`): Of a full training, in the unit of `fit`, which is epochs or steps.
        greater_is_better (`bool`): Whether a larger metric is better.
        final_training (`bool`): Whether the winner is rewound and trained once more, in the phase `"final"`.
        seed (`int`): Fresh values are drawn from the one after it.
        progress_bar (`bool`): Show one over the candidates.

    Example:

        ```py
        >>> search = PruningSearch(adapter, config, state, fit, score, log, length=20, greater_is_better=True)
        >>> search.run().best.name
        'candidate-7'
        ```
    """

    adapter: PromptedAdapter
    config: PruningConfig
    state: SearchState
    fit: Callable[[str, float], Outcome]
    score: Callable[[], PromptScores]
    log: Callable[[str, Candidate], None]
    length: float
    greater_is_better: bool
    final_training: bool = False
    seed: int = 42
    progress_bar: bool = False

    def run(self) -> SearchResult:
        """Run it, or what is left of it. The winner is in the model afterwards."""
        start = self._start()
        start.restore()
        tuned = self._train(TUNE, self.length)
        self._restore(TUNE)
        reference, candidates = list_candidates(self.adapter, self._scores(), self.config)
        reference.add(TUNE, tuned)
        self.log(TUNE, reference)

        rounds = plan_rounds(self.config, len(candidates), self.length)
        number = sum(count for count, _ in rounds)
        finalists = candidates
        with tqdm(total=number, desc="Pruning candidates", disable=not self.progress_bar) as progress:
            for count, length in rounds:
                finalists = survivors(finalists, count, self.greater_is_better)
                for candidate in finalists:
                    phase = candidate.name if length == self.length else f"{candidate.name}-{length:g}"
                    start.rewind(candidate.masks)
                    candidate.add(phase, self._train(phase, length))
                    self.log(phase, candidate)
                    progress.update()

        best = choose(reference, finalists, self.greater_is_better, self.config.tolerance)
        phase = TUNE if best is reference else best.name
        if self.final_training:
            phase = FINAL
            start.rewind(best.masks)
            self._train(FINAL, self.length)

        # What the winner started from is what rewinding it by hand goes back to.
        if phase == TUNE:
            start.restore()
        else:
            start.rewind(best.masks)
        self._restore(phase)
        return SearchResult(reference, candidates, best, phase, self._outcomes())

    def _start(self) -> Start:
        """Where the search started, which a model that resumes it need not know."""
        state, adapter = self.state, self.adapter
        if not {INITIAL, START} <= state.records.keys():
            state.finish(INITIAL, {}, InitialValues.of(adapter).values)
            state.finish(START, {}, AdapterSnapshot.of(adapter).to_tensors())
        initial = InitialValues(state.tensors(INITIAL))
        snapshot = AdapterSnapshot.from_tensors(state.tensors(START))
        return Start(adapter, initial, snapshot, self.seed + 1 if self.config.rewind == "fresh" else None)

    def _train(self, phase: str, length: float) -> Outcome:
        """Train the adapter as it is now, unless that has been done."""
        if phase not in self.state.records:
            outcome = self.fit(phase, length)
            self.state.finish(phase, asdict(outcome), AdapterSnapshot.of(self.adapter).to_tensors())
        return Outcome(**self.state.records[phase])

    def _restore(self, phase: str) -> None:
        """Make the adapter what it was at the end of a phase."""
        AdapterSnapshot.from_tensors(self.state.tensors(phase)).restore(self.adapter)

    def _scores(self) -> PromptScores:
        """The scores of the adapter as it is now, unless that has been scored."""
        if "scores" not in self.state.records:
            scores = self.score()
            self.state.finish("scores", {}, {"tokens": scores.tokens, "segments": scores.segments.contiguous()})
        saved = self.state.tensors("scores")
        return PromptScores(saved["tokens"], saved["segments"], self.config.importance)

    def _outcomes(self) -> dict[str, Outcome]:
        return {phase: Outcome(**record) for phase, record in self.state.records.items() if "steps" in record}
