from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from peft import get_peft_model

from e2vpt_peft import E2VPTConfig, PromptScores, prune_prompts
from e2vpt_peft.masks import PromptMasks, select

from .support.models import prompt_parameters, tiny_vit


def config(tokens=3, segments=4, **fields):
    empty = {"token_mask": None, "segment_mask": None}
    return SimpleNamespace(num_visual_prompts=tokens, num_segments=segments, **{**empty, **fields})


def masks(tokens, segments):
    return PromptMasks(torch.tensor(tokens), torch.tensor(segments))


@st.composite
def any_masks(draw):
    count, segments = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    row = st.lists(st.booleans(), min_size=segments, max_size=segments)
    tokens = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    return masks(tokens, draw(st.lists(row, min_size=count, max_size=count)))


ROWS = [[True, False, True, True], [True, True, True, True], [False, True, True, False]]


def test_a_config_without_masks_keeps_everything():
    whole = PromptMasks.of(config())
    assert whole.tokens.tolist() == [True] * 3
    assert whole.segments.tolist() == [[True] * 4] * 3
    assert whole == PromptMasks.unpruned(config(token_mask=[True, False, True]))


def test_a_pruned_prompt_keeps_none_of_its_segments():
    pruned = PromptMasks.of(config(token_mask=[True, False, True], segment_mask=ROWS))
    assert pruned.tokens.tolist() == [True, False, True]
    assert pruned.segments.tolist() == [ROWS[0], [False] * 4, ROWS[2]]
    assert pruned.kept_segments.tolist() == [ROWS[0], ROWS[2]]
    assert (pruned.num_tokens, pruned.num_segments) == (2, 5)


@given(any_masks())
def test_what_is_written_to_a_config_is_read_from_it(kept):
    written = config(*kept.segments.shape)
    kept.write_to(written)
    assert PromptMasks.of(written) == kept


def test_a_config_has_no_mask_of_what_is_whole():
    written = config(token_mask=[True, False, True], segment_mask=ROWS)
    PromptMasks.unpruned(written).write_to(written)
    assert written.token_mask is None and written.segment_mask is None
    masks([True, False, True], [[True] * 4] * 3).write_to(written)
    assert written.token_mask == [True, False, True] and written.segment_mask is None
    masks([True] * 3, ROWS).write_to(written)
    assert written.token_mask is None and written.segment_mask == ROWS


def test_only_segments_that_a_kept_prompt_lacks_make_it_flat():
    assert not masks([True, False], [[True] * 2, [False] * 2]).has_pruned_segments
    assert masks([True, True], [[True] * 2, [True, False]]).has_pruned_segments


def test_components_are_those_of_a_comb():
    """Component j of a prompt belongs to segment j % 4; the rows are the prompts that are kept."""
    pruned = masks([True, False, True], ROWS)
    assert pruned.components(8).tolist() == [0, 2, 3, 4, 6, 7, 8 + 1, 8 + 2, 8 + 5, 8 + 6]
    assert PromptMasks.unpruned(config()).components(8) is None
    assert masks([False, True, False], ROWS).components(8) is None


@given(any_masks(), st.integers(1, 3))
def test_there_are_as_many_parameters_as_components(kept, times):
    hidden_size = times * kept.segments.shape[1]
    components = kept.components(hidden_size)
    expected = kept.num_tokens * hidden_size if components is None else len(components)
    assert kept.num_parameters(hidden_size) == expected


@pytest.mark.parametrize(
    ("tokens", "rows"), [([True] * 3, ROWS), ([True, False, True], ROWS), ([False, True] * 2, [])]
)
def test_parameters_are_counted_as_they_are(tokens, rows):
    model = get_peft_model(tiny_vit(), E2VPTConfig(num_visual_prompts=len(tokens), num_segments=4, num_kv_prompts=0))
    prune_prompts(model, token_mask=tokens)
    if rows:
        prune_prompts(model, segment_mask=[row for row, kept in zip(rows, tokens) if kept])
    sizes = {parameter.numel() for parameter in prompt_parameters(model).values()}
    assert sizes == {PromptMasks.of(model.peft_config["default"]).num_parameters(32)}


def test_keeping_counts_among_what_is_kept_and_brings_nothing_back():
    kept = masks([True, False, True], ROWS)
    fewer = kept.keep(torch.tensor([False, True]), torch.ones(2, 4, dtype=torch.bool))
    assert fewer == masks([False, False, True], ROWS)
    assert kept.keep(torch.tensor([True, True]), torch.ones(2, 4, dtype=torch.bool)) == kept
    narrower = kept.keep(torch.tensor([True, True]), torch.tensor([[False, True, True, True], [True] * 4]))
    assert narrower == masks([True, False, True], [[False, False, True, True], ROWS[1], ROWS[2]])


def test_pruning_takes_the_lowest_prompts_and_then_the_lowest_segments_of_those_left():
    scores = PromptScores(
        torch.tensor([0.3, 0.1, 0.2]),
        torch.tensor([[0.4, 0.1, 0.3, 0.2], [0.0, 0.0, 0.0, 0.0], [0.1, 0.2, 0.3, 0.4]]),
    )
    whole = PromptMasks.unpruned(config())
    assert whole.prune(scores, rates=(0.34, 0.5), minimum=(1, 1)) == masks(
        [True, False, True], [[True, False, True, False], [False] * 4, [False, False, True, True]]
    )
    assert whole.prune(scores, rates=(0.33, 0.0), minimum=(1, 1)) == whole, "a share is rounded down"
    assert whole.prune(scores, rates=(1.0, 1.0), minimum=(2, 3)) == masks(
        [True, False, True], [[True, False, True, True], [False] * 4, [False, True, True, True]]
    )


def test_pruning_again_counts_among_what_is_left():
    left = masks([True, False, True, True], [ROWS[0], [False] * 4, ROWS[2], ROWS[1]])
    scores = PromptScores(
        torch.tensor([0.2, 0.3, 0.1]), torch.tensor([[0.0, 9.0, 1.0, 2.0], [9.0, 2, 1, 9], [1, 2, 3, 4]])
    )
    assert left.prune(scores, rates=(0.5, 0.5), minimum=(1, 1)) == masks(
        [True, False, True, False], [[False, False, True, True], [False] * 4, [False, True, False, False], [False] * 4]
    )


@given(any_masks(), st.data())
def test_masks_are_values_that_nothing_changes(kept, data):
    tokens, segments = kept.tokens.clone(), kept.segments.clone()
    scores = PromptScores(torch.rand(kept.num_tokens), torch.rand(kept.num_tokens, segments.shape[1]))
    rates = data.draw(st.tuples(st.floats(0, 1), st.floats(0, 1)))
    pruned = kept.prune(scores, rates, minimum=(1, 1))
    kept.keep(torch.zeros(kept.num_tokens, dtype=torch.bool), torch.zeros_like(kept.kept_segments))
    kept.write_to(config(*segments.shape))
    assert torch.equal(kept.tokens, tokens) and torch.equal(kept.segments, segments)
    assert not (pruned.tokens & ~tokens).any() and not (pruned.segments & ~segments).any()
    assert pruned.num_tokens >= min(kept.num_tokens, 1)


def test_masks_are_equal_and_hashed_by_what_they_keep():
    kept = masks([True, False, True], ROWS)
    same = masks([True, False, True], [ROWS[0], [True] * 4, ROWS[2]])  # of a prompt that is gone
    assert kept == same and hash(kept) == hash(same) and len({kept, same}) == 1
    others = [
        masks([True, True, True], ROWS),
        masks([True, False, True], [ROWS[0]] * 3),
        PromptMasks.unpruned(config()),
    ]
    assert all(kept != other for other in others) and len({kept, same, *others}) == 4
    assert kept != "masks"
    empty = [[True] * 4, [False] * 4]
    assert masks([True, True], empty) != masks([True, False], empty), "a prompt without segments is not a pruned one"
    assert PromptMasks.unpruned(config(2)) != PromptMasks.unpruned(config(3))


class TestSelecting:
    def test_the_lowest_scores_go_first_and_ties_go_to_the_lower_index(self):
        keep = select(torch.tensor([1.0, 0, 0, 2, 0, 1]), torch.ones(6, dtype=torch.bool), 1, count=2)
        assert keep.tolist() == [True, False, False, True, True, True]
        tied = select(torch.zeros(2, 8), torch.ones(2, 8, dtype=torch.bool), 1, count=3)
        assert tied.tolist() == [[False] * 3 + [True] * 5] * 2

    def test_what_is_absent_is_neither_kept_nor_counted(self):
        present = torch.tensor([[False, True, True, True, True], [True, False, False, False, True]])
        keep = select(torch.tensor([[9.0, 4, 3, 2, 1], [2, 9, 9, 9, 1]]), present, 1, rate=0.5)
        assert keep.tolist() == [[False, True, True, False, False], [True, False, False, False, False]]

    @given(st.integers(1, 200), st.integers(0, 100))
    @example(count=100, percent=29)  # 100 * 0.29 is a little less than 29
    @example(count=100, percent=53)  # and 100 * 0.53, in float32, than 53
    def test_a_rate_is_rounded_down_and_not_by_the_last_digit_of_a_product(self, count, percent):
        kept = select(torch.rand(count), torch.ones(count, dtype=torch.bool), 0, rate=percent / 100)
        assert kept.sum() == count - count * percent // 100

    def test_a_minimum_stays_in_each_row_if_there_are_so_many(self):
        present = torch.tensor([[True] * 4, [True, False, False, False]])
        assert select(torch.rand(2, 4), present, 3, count=9).sum(1).tolist() == [3, 1]

    def test_what_is_infinitely_bad_is_still_better_than_absent(self):
        present = torch.tensor([True, False, True])
        assert select(torch.tensor([float("-inf"), 0.0, 1.0]), present, 2, count=1).tolist() == [True, False, True]

    def test_scores_in_any_precision_and_not_finite_ones_have_an_order(self):
        scores = torch.tensor([float("inf"), 1.0, float("-inf"), 0.0], dtype=torch.float16)
        assert select(scores, torch.ones(4, dtype=torch.bool), 1, count=2).tolist() == [True, True, False, False]
