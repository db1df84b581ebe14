from __future__ import annotations

import math

import pytest
import torch

from e2vpt_peft import PromptScores, PruningConfig
from e2vpt_peft.adapter import PromptedAdapter
from e2vpt_peft.masks import PromptMasks
from e2vpt_peft.trainer.candidates import Candidate, Outcome, choose, list_candidates, plan_rounds, ranked, survivors

from .toy import adapted, taken


def candidate(name, metric=None, parameters=10):
    masks = PromptMasks(torch.ones(1, dtype=torch.bool), torch.ones(1, 1, dtype=torch.bool))
    return Candidate(name, masks, parameters, [], metric)


def test_rates_that_keep_the_same_prompts_are_one_candidate():
    model = adapted()
    before = taken(model)
    scores = PromptScores(torch.arange(4.0), torch.rand(4, 4))
    config = PruningConfig(token_rates=[0.1, 0.25, 0.3, 0.9], segment_rates=[0.0, 0.2, 0.9], min_tokens=2)
    reference, candidates = list_candidates(PromptedAdapter.find(model), scores, config)
    assert reference.rates == [(0.0, 0.0), (0.1, 0.0), (0.1, 0.2)]
    assert [c.rates[0] for c in candidates] == [(0.1, 0.9), (0.25, 0.0), (0.25, 0.9), (0.9, 0.0), (0.9, 0.9)]
    assert candidates[1].rates == [(0.25, 0.0), (0.25, 0.2), (0.3, 0.0), (0.3, 0.2)]
    assert [c.masks.num_tokens for c in candidates] == [4, 3, 3, 2, 2]
    assert [c.masks.num_segments for c in candidates] == [4, 12, 3, 8, 2]
    kv = 2 * 4 * 2 * 8
    assert [c.parameters - kv for c in candidates] == [2 * 8 * n for n in (4, 12, 3, 8, 2)]
    assert reference.parameters - kv == 2 * 4 * 32
    after = taken(model)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_the_grid_is_one_round_of_full_trainings():
    assert plan_rounds(PruningConfig(), 81, 100) == [(81, 100)]


@pytest.mark.parametrize(
    ("candidates", "epochs", "rounds"),
    [
        (81, 100, [(81, 4), (27, 11), (9, 33), (3, 100)]),
        (10, 100, [(10, 4), (4, 11), (2, 33), (1, 100)]),
        (81, 9, [(81, 1), (27, 3), (9, 9)]),
        (81, 1, [(81, 1)]),
        (81, 0.5, [(81, 0.5)]),
        (1, 100, [(1, 100)]),
        (0, 100, [(0, 100)]),
    ],
)
def test_halving_trains_fewer_candidates_for_longer(candidates, epochs, rounds):
    assert plan_rounds(PruningConfig(search="halving"), candidates, epochs) == rounds


def test_the_best_survive_a_round_and_ties_go_to_the_sparser():
    values = {"a": (0.1, 10), "b": (0.9, 10), "c": (0.5, 20), "d": (0.5, 10)}
    candidates = [candidate(name, *value) for name, value in values.items()]
    assert [one.name for one in survivors(candidates, 2, greater_is_better=True)] == ["b", "d"]
    assert [one.name for one in survivors(candidates, 2, greater_is_better=False)] == ["a", "d"]
    assert survivors(candidates, 4, greater_is_better=True) == candidates, "in their order"


def test_a_candidate_has_its_last_metric_and_all_its_epochs():
    one = candidate("candidate-1")
    one.add("candidate-1-2", Outcome(0.5, 2.0, 8, 1.0))
    one.add("candidate-1", Outcome(0.7, 6.0, 24, 0.5))
    assert (one.metric, one.epochs, one.phase) == (0.7, 8.0, "candidate-1")


def test_ranks_follow_the_metric_then_the_parameters_then_the_order():
    candidates = [
        candidate("nan", math.nan, 1),
        candidate("dense", 0.5, 30),
        candidate("sparse", 0.5, 20),
        candidate("later", 0.5, 20),
        candidate("other", 0.4, 20),
    ]
    assert [c.name for c in ranked(candidates, True)] == ["sparse", "later", "dense", "other", "nan"]
    assert [c.name for c in ranked(candidates, False)] == ["other", "sparse", "later", "dense", "nan"]


@pytest.mark.parametrize(
    ("unpruned", "pruned", "greater_is_better", "tolerance", "winner"),
    [
        (0.8, [0.7, 0.9], True, 0.0, "1"),
        (0.8, [0.8, 0.7], True, 0.0, "0"),  # a tie goes to the sparser one
        (0.8, [0.7, 0.75], True, 0.0, "unpruned"),
        (0.8, [0.7, 0.75], True, 0.05001, "1"),
        (0.8, [0.7, 0.75], False, 0.0, "0"),
        (0.8, [0.9, 0.85], False, 0.0, "unpruned"),
        (0.8, [0.9, 0.85], False, 0.1, "1"),
        (0.8, [math.nan], True, 10.0, "unpruned"),
        (math.nan, [0.1, math.nan], True, 0.0, "0"),
        (math.nan, [math.nan], True, 0.0, "unpruned"),
        (0.8, [], True, 0.0, "unpruned"),
    ],
)
def test_the_winner_is_never_worse_than_unpruned_by_more_than_the_tolerance(
    unpruned, pruned, greater_is_better, tolerance, winner
):
    candidates = [candidate(str(index), metric) for index, metric in enumerate(pruned)]
    chosen = choose(candidate("unpruned", unpruned, 100), candidates, greater_is_better, tolerance)
    assert chosen.name == winner
