"""The recipe, with a training that only notes what it was given: no Trainer, no data, no gradients."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from e2vpt_peft import PromptScores, rewind_prompts
from e2vpt_peft.adapter import PromptedAdapter
from e2vpt_peft.pruning import AdapterSnapshot
from e2vpt_peft.trainer.candidates import Candidate, Outcome
from e2vpt_peft.trainer.search import PruningSearch, SearchResult
from e2vpt_peft.trainer.state import SearchState

from .interrupted import Interruption
from .toy import adapted, pruning, taken

SCORES = PromptScores(torch.arange(4.0), torch.arange(16.0).reshape(4, 4))
METRICS = {"tune": 0.5, "candidate-1": 0.6, "candidate-2": 0.4, "candidate-3": 0.7, "candidate-4": 0.3}
FULL = 4.0


@dataclass
class Bench:
    """A search of a small adapter, and what it asked for."""

    folder: Path
    metrics: dict[str, float] = field(default_factory=lambda: METRICS)
    stop_at: float = math.inf
    """The event (a training, a scoring, a log entry) at which it is killed."""
    seed: int = 0
    """Of the initial values."""
    events: list[str] = field(default_factory=list)
    lengths: dict[str, float] = field(default_factory=dict)
    starts: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model = adapted(self.seed)
        self.adapter = PromptedAdapter.find(self.model)

    def happen(self, event: str) -> None:
        self.events.append(event)
        if len(self.events) >= self.stop_at:
            raise Interruption

    def fit(self, phase: str, length: float) -> Outcome:
        self.lengths[phase], self.starts[phase] = length, taken(self.model)
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.mul_(0.5).add_(sum(phase.encode()) % 13)  # another one in every phase
        self.happen(f"fit {phase}")
        without_length = "-".join(phase.split("-")[:2])
        return Outcome(self.metrics.get(phase, self.metrics[without_length]), length, int(4 * length), 0.1)

    def score(self) -> PromptScores:
        self.starts["score"] = taken(self.model)
        self.happen("score")
        return SCORES

    def log(self, phase: str, candidate: Candidate) -> None:
        self.happen(f"log {phase} {candidate.name}")

    def run(self, resume: bool = False, **options: Any) -> SearchResult:
        final_training = options.pop("final_training", False)
        greater_is_better = options.pop("greater_is_better", True)
        state = SearchState(str(self.folder), {}, resume)
        search = PruningSearch(
            self.adapter,
            pruning(**options),
            state,
            self.fit,
            self.score,
            self.log,
            FULL,
            greater_is_better,
            final_training,
        )
        return search.run()

    @property
    def trained(self) -> list[str]:
        return [event.removeprefix("fit ") for event in self.events if event.startswith("fit")]

    def left_by(self, phase: str) -> dict[str, torch.Tensor]:
        return SearchState(str(self.folder), {}, resume=True).tensors(phase)


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_order_of_the_grid(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    result = bench.run()
    candidates = [f"candidate-{number}" for number in (1, 2, 3, 4)]
    expected = ["fit tune", "score", "log tune unpruned"]
    expected += [event for name in candidates for event in (f"fit {name}", f"log {name} {name}")]
    assert bench.events == expected
    assert set(bench.lengths.values()) == {FULL}
    assert list(result.outcomes) == ["tune", *candidates]
    assert result.outcomes["candidate-3"] == Outcome(0.7, 4.0, 16, 0.1)
    assert [one.metric for one in (result.reference, *result.candidates)] == list(METRICS.values())


def test_what_is_scored_is_tuned(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.run()
    assert same(bench.starts["score"], bench.left_by("tune"))


def test_every_candidate_starts_from_the_initial_values_of_what_it_keeps(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    result = bench.run()
    assert same(bench.starts["tune"], taken(adapted()))
    for candidate in result.candidates:
        by_hand = adapted()
        PromptedAdapter.find(by_hand).set_masks(candidate.masks)
        assert same(bench.starts[candidate.name], taken(by_hand))


def test_the_winner_is_left_and_rewinds_to_where_it_started(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    result = bench.run()
    assert (result.best.name, result.final_phase, result.has_pruned) == ("candidate-3", "candidate-3", True)
    assert same(taken(bench.model), bench.left_by("candidate-3"))
    rewind_prompts(bench.model)
    assert same(taken(bench.model), bench.starts["candidate-3"])


@pytest.mark.parametrize(
    ("metrics", "options", "winner"),
    [
        ({}, {"greater_is_better": False}, "candidate-4"),
        ({"tune": 0.8}, {}, "unpruned"),
        ({"tune": 0.8}, {"tolerance": 0.11}, "candidate-3"),
        ({"candidate-1": 0.7}, {}, "candidate-3"),  # a tie goes to the sparser one
        ({"candidate-3": math.nan}, {}, "candidate-1"),
        (dict.fromkeys(METRICS, math.nan), {}, "unpruned"),
    ],
)
def test_which_one_wins(metrics: dict[str, float], options: dict[str, Any], winner: str, tmp_path: Path) -> None:
    assert Bench(tmp_path, {**METRICS, **metrics}).run(**options).best.name == winner


def test_nothing_is_pruned_if_nothing_is_good_enough(tmp_path: Path) -> None:
    bench = Bench(tmp_path, {**METRICS, "tune": 0.9})
    result = bench.run(rewind="fresh")
    assert result.best is result.reference and result.final_phase == "tune" and not result.has_pruned
    assert same(taken(bench.model), bench.left_by("tune"))
    rewind_prompts(bench.model)
    assert same(taken(bench.model), bench.starts["tune"])


def test_halving_trains_the_better_half_anew_for_longer(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    result = bench.run(search="halving", halving_factor=2, halving_rounds=2)
    first_round = [f"candidate-{number}-2" for number in (1, 2, 3, 4)]
    assert bench.trained == ["tune", *first_round, "candidate-3", "candidate-1"]
    assert [bench.lengths[phase] for phase in bench.trained] == [4, 2, 2, 2, 2, 4, 4]
    assert same(bench.starts["candidate-3"], bench.starts["candidate-3-2"])
    assert [one.epochs for one in result.candidates] == [6, 2, 6, 2]
    assert [one.phase for one in result.candidates] == ["candidate-1", "candidate-2-2", "candidate-3", "candidate-4-2"]
    assert (result.best.name, result.final_phase) == ("candidate-3", "candidate-3")


def test_a_round_is_among_the_best_of_the_round_before(tmp_path: Path) -> None:
    bench = Bench(tmp_path, {**METRICS, "candidate-3-2": 0.35, "candidate-1-2": 0.36})
    bench.run(search="halving", halving_factor=2, halving_rounds=3)
    first_round = [f"candidate-{number}-1" for number in (1, 2, 3, 4)]
    assert bench.trained[1:] == [*first_round, "candidate-3-2", "candidate-1-2", "candidate-1"]


def test_in_halving_a_smaller_metric_may_be_the_better(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.run(search="halving", halving_factor=2, halving_rounds=2, greater_is_better=False)
    assert bench.trained[-2:] == ["candidate-4", "candidate-2"]


def test_only_candidates_of_the_last_round_win(tmp_path: Path) -> None:
    bench = Bench(tmp_path, {**METRICS, "candidate-1": 0.35, "candidate-1-2": 0.6, "candidate-3": 0.36, "tune": 0.38})
    bench.metrics["candidate-3-2"] = 0.7
    result = bench.run(search="halving", halving_factor=2, halving_rounds=2, tolerance=0.1)
    assert (result.best.name, result.candidates[1].metric) == ("candidate-3", 0.4)


@pytest.mark.parametrize("tuned", [0.5, 0.9])
def test_the_final_training_is_of_the_winner_from_its_start(tuned: float, tmp_path: Path) -> None:
    bench = Bench(tmp_path, {**METRICS, "tune": tuned, "final": 0.0})
    result = bench.run(final_training=True)
    assert bench.trained[-1] == result.final_phase == "final" and bench.lengths["final"] == FULL
    searched = "candidate-3" if tuned == 0.5 else "tune"
    assert same(bench.starts["final"], bench.starts[searched])
    assert same(taken(bench.model), bench.left_by("final"))
    assert result.best.metric == bench.metrics[searched], "not judged by the final training"
    rewind_prompts(bench.model)
    assert same(taken(bench.model), bench.starts["final"])


def test_fresh_values_are_the_same_for_all_candidates(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.run(rewind="fresh", segment_rates=[0.0])
    names = [name for name in bench.starts["candidate-1"] if "e2vpt_kv_prompts" in name]
    assert names
    for name in names:
        assert torch.equal(bench.starts["candidate-1"][name], bench.starts["candidate-2"][name])
        assert not torch.equal(bench.starts["candidate-1"][name], bench.starts["tune"][name])


def test_what_was_tuned_before_the_search_is_where_tuning_starts(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    with torch.no_grad():
        for parameter in bench.model.parameters():
            parameter.add_(1)
    before = taken(bench.model)
    bench.run()
    assert same(bench.starts["tune"], before) and not same(bench.starts["candidate-1"], before)


OPTIONS = {"search": "halving", "halving_factor": 2, "halving_rounds": 2, "final_training": True}


@pytest.fixture(scope="module", params=["saved", "fresh"])
def undisturbed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Bench, SearchResult, dict[str, Any]]:
    options = {**OPTIONS, "rewind": request.param}
    bench = Bench(tmp_path_factory.mktemp("undisturbed"), {**METRICS, "final": 0.0})
    return bench, bench.run(**options), options


@pytest.mark.parametrize("moment", range(1, 17))
def test_killed_at_any_event_it_goes_on_and_ends_the_same(
    moment: int, undisturbed: tuple[Bench, SearchResult, dict[str, Any]], tmp_path: Path
) -> None:
    whole, expected, options = undisturbed
    assert len(whole.events) == 16
    killed = Bench(tmp_path, whole.metrics, stop_at=moment)
    with pytest.raises(Interruption):
        killed.run(**options)

    resumed = Bench(tmp_path, whole.metrics, seed=7)  # its own initial values must not matter
    result = resumed.run(resume=True, **options)
    assert [row.row() for row in result.candidates] == [row.row() for row in expected.candidates]
    assert (result.best.name, result.final_phase) == (expected.best.name, expected.final_phase)
    assert result.outcomes == expected.outcomes
    assert same(taken(resumed.model), taken(whole.model))
    for phase, start in resumed.starts.items():
        assert same(start, whole.starts[phase])
    rewind_prompts(resumed.model)
    assert same(taken(resumed.model), whole.starts["final"])

    # What was finished is not done again; what was under way is.
    times = Counter(killed.trained + resumed.trained)
    under_way = killed.events[-1].removeprefix("fit ")
    assert all(count == (2 if phase == under_way else 1) for phase, count in times.items())
    assert killed.events[:-1].count("score") + resumed.events.count("score") == 1


def test_a_finished_search_only_gives_its_result(undisturbed: tuple[Bench, SearchResult, dict[str, Any]]) -> None:
    whole, expected, options = undisturbed
    again = Bench(whole.folder, seed=5)
    result = again.run(resume=True, **options)
    assert not again.trained and "score" not in again.events
    assert result.outcomes == expected.outcomes
    assert same(taken(again.model), taken(whole.model))


def test_tensors_are_written_before_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path)

    def fail(self: SearchState, records: Any) -> None:
        if "tune" in records:
            raise Interruption

    state = SearchState(str(tmp_path), {}, resume=False)
    monkeypatch.setattr(SearchState, "_write", fail)
    with pytest.raises(Interruption):
        state.finish("tune", {}, AdapterSnapshot.of(bench.adapter).to_tensors())
    assert (state.folder / "tune.safetensors").exists()
    assert "tune" not in state.records
