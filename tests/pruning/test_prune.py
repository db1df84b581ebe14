from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from e2vpt_peft import E2VPTConfig, PromptScores, prune_prompts
from e2vpt_peft.adapter import PromptedAdapter
from e2vpt_peft.pruning.prune import PruningSummary, least_segments

from ..support.models import images, prompt_parameters, tiny_vit
from ..support.prompted import with_prompts
from ..support.reference import random_prompts
from .common import SEGMENTS, adapted, both_depths, layers_of, scores


@both_depths
def test_an_adapter_with_pruned_tokens_is_one_that_was_built_with_fewer(depth):
    prompts = random_prompts(tiny_vit(), 6, 3, shallow=depth == "shallow")
    pruned = with_prompts(tiny_vit(), prompts)
    prune_prompts(pruned, token_mask=[True, False, True, True, False, False])
    prompts.visual = prompts.visual[:, [0, 2, 3]]
    built = with_prompts(tiny_vit(), prompts)
    assert torch.equal(pruned(pixel_values=images()).logits, built(pixel_values=images()).logits)
    assert {n: p.shape for n, p in prompt_parameters(pruned).items()} == {
        n: p.shape for n, p in prompt_parameters(built).items()
    }


@both_depths
def test_an_adapter_with_pruned_segments_is_one_with_zeros_there(depth):
    prompts = random_prompts(tiny_vit(), 6, 3, shallow=depth == "shallow")
    mask = torch.rand(6, SEGMENTS, generator=torch.Generator().manual_seed(0)) > 0.5
    pruned = with_prompts(tiny_vit(), prompts, num_segments=SEGMENTS)
    prune_prompts(pruned, segment_mask=mask)
    prompts.visual = prompts.visual * mask.repeat(1, 32 // SEGMENTS)
    zeroed = with_prompts(tiny_vit(), prompts)
    torch.testing.assert_close(pruned(pixel_values=images()).logits, zeroed(pixel_values=images()).logits)
    layer = layers_of(pruned)[0]
    assert layer.e2vpt_visual_prompts["default"].numel() == int(mask.sum()) * 32 // SEGMENTS


@both_depths
def test_pruned_segments_stay_zero_under_training_with_weight_decay(depth):
    model = adapted(depth)
    prune_prompts(model, scores(), token_rate=0.5, segment_rate=0.5)
    before = layers_of(model)[0].full_prompts("default")
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1, weight_decay=0.5)
    model.train()
    for _ in range(3):
        model(pixel_values=images(), labels=torch.tensor([0, 1, 2])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = layers_of(model)[0].full_prompts("default")
    assert torch.equal(after == 0, before == 0)
    assert int((after == 0).sum()) == 3 * 32 + 3 * 16
    assert not torch.equal(after, before)


@both_depths
def test_a_pruned_adapter_saves_loads_and_shrinks(depth, tmp_path):
    model = adapted(depth)
    model.save_pretrained(tmp_path / "whole")
    summary = prune_prompts(model, scores(), token_rate=0.5, segment_rate=0.5)
    model.save_pretrained(tmp_path / "pruned")
    expected = model(pixel_values=images()).logits

    config = PeftConfig.from_pretrained(tmp_path / "pruned")
    assert sum(config.token_mask) == 3
    assert config.num_visual_prompts == 6
    loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path / "pruned")
    assert torch.equal(loaded(pixel_values=images()).logits, expected)
    low_memory = PeftModel.from_pretrained(tiny_vit(), tmp_path / "pruned", low_cpu_mem_usage=True)
    assert torch.equal(low_memory(pixel_values=images()).logits, expected)

    whole, pruned = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "pruned"))
    prompts = [{name: t for name, t in tensors.items() if name.endswith("_prompts")} for tensors in (whole, pruned)]
    sizes = [sum(t.numel() for t in tensors.values()) for tensors in prompts]
    assert sizes == [summary.parameters_before, summary.parameters_after]
    bytes_saved = [(tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("whole", "pruned")]
    assert bytes_saved[0] - bytes_saved[1] == pytest.approx(4 * (sizes[0] - sizes[1]), abs=800)


@both_depths
def test_a_loaded_pruned_adapter_trains_and_can_be_pruned_again(depth, tmp_path):
    model = adapted(depth)
    prune_prompts(model, scores(), token_rate=0.5, segment_rate=0.5)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path, is_trainable=True).eval()
    summaries = [prune_prompts(m, scores(3, seed=5), token_count=1, segment_count=2) for m in (model, loaded)]
    assert summaries[0] == summaries[1]
    assert (summaries[0].tokens_before, summaries[0].tokens_after) == (3, 2)
    assert (summaries[0].segments_before, summaries[0].segments_after) == (12, 4)
    assert torch.equal(model(pixel_values=images()).logits, loaded(pixel_values=images()).logits)


@pytest.mark.parametrize("nothing", [{"token_count": 0, "segment_count": 0}, {"token_rate": 0, "segment_rate": 0}])
def test_nothing_is_pruned_if_nothing_is_asked_for(nothing):
    model = adapted()
    summary = prune_prompts(model, scores(), **nothing)
    assert summary.parameters_after == summary.parameters_before
    assert model.peft_config["default"].token_mask is None and model.peft_config["default"].segment_mask is None


def test_pruning_one_adapter_never_touches_another():
    model = adapted()
    model.add_adapter("other", E2VPTConfig(num_visual_prompts=6, num_segments=SEGMENTS))
    before = {n: p.clone() for n, p in model.named_parameters() if ".other" in n}
    config = copy.deepcopy(model.peft_config["other"])
    prune_prompts(model, scores(), token_rate=0.5, segment_rate=0.5, adapter_name="default")
    after = {n: p for n, p in model.named_parameters() if ".other" in n}
    assert before.keys() == after.keys()
    assert all(torch.equal(after[n], p) for n, p in before.items())
    assert model.peft_config["other"] == config


@both_depths
def test_pruned_and_whole_adapters_in_one_batch(depth):
    model = adapted(depth)
    for name in ("whole", "pruned"):
        model.add_adapter(
            name,
            E2VPTConfig(
                visual_prompt_depth=depth,
                num_visual_prompts=6,
                num_segments=SEGMENTS,
                modules_to_save=["classifier"],
            ),
        )
    prune_prompts(model, scores(), token_rate=0.5, segment_rate=0.5, adapter_name="pruned")
    names = ["pruned", "whole", "default", "__base__", "pruned"]
    batch = images(5)
    together = model(pixel_values=batch, adapter_names=names).logits
    for index, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                alone = model(pixel_values=batch[index : index + 1]).logits
        else:
            model.set_adapter(name)
            alone = model(pixel_values=batch[index : index + 1]).logits
        torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "tokens", "segments"),
    [
        ({"token_rate": 0.0, "segment_rate": 0.0}, 6, 48),
        ({"token_rate": 0.3}, 5, 40),
        ({"token_rate": 1.0}, 1, 8),
        ({"token_rate": 1.0, "min_tokens": 2}, 2, 16),
        ({"segment_rate": 1.0}, 6, 12),
        ({"segment_rate": 1.0, "min_segments": 1}, 6, 6),
        ({"token_count": 2, "segment_count": 3}, 4, 20),
        ({"token_rate": 0.5, "segment_count": 100}, 3, 6),
    ],
)
def test_rates_are_rounded_down_and_minima_are_kept(arguments, tokens, segments):
    summary = prune_prompts(adapted(), scores(), **arguments)
    assert (summary.tokens_after, summary.segments_after) == (tokens, segments)


def test_the_lowest_scores_go_first_and_ties_go_to_the_lower_index():
    model = adapted()
    tied = PromptScores(torch.tensor([1.0, 0, 0, 2, 0, 1]), torch.zeros(6, SEGMENTS))
    prune_prompts(model, tied, token_count=2, segment_count=3)
    config = model.peft_config["default"]
    assert config.token_mask == [True, False, False, True, True, True]
    assert config.segment_mask[0] == [False] * 3 + [True] * 5
    assert config.segment_mask[1] == [False] * 8


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"token_rate": 0.5}, ["token_rate needs scores"]),
        ({"scores": scores(), "token_rate": 1.5}, ["token_rate=1.5", "[0, 1]"]),
        ({"scores": scores(), "segment_rate": -0.1}, ["segment_rate=-0.1"]),
        ({"scores": scores(), "token_count": -1}, ["token_count=-1"]),
        ({"scores": scores(), "token_rate": 0.5, "token_count": 1}, ["token_rate and token_count", "contradict"]),
        ({"scores": scores(5), "token_rate": 0.5}, ["scores.tokens", "(6,), for the 6", "(5,): score it again"]),
        ({"scores": scores(), "token_rate": float("nan")}, ["token_rate=nan", "[0, 1]"]),
        ({"scores": scores(), "token_rate": 1.0, "min_tokens": 0}, ["min_tokens=0 must be 1 or more"]),
        ({"scores": scores(), "segment_count": 8, "min_segments": 0}, ["min_segments=0 must be 1 or more"]),
        ({"scores": scores(), "token_rate": 1.0, "min_tokens": -5}, ["min_tokens=-5 must be 1 or more"]),
        ({"token_mask": [True] * 2 + [False] * 4, "segment_mask": [[False] * 8] * 2 + [[True] * 8] * 4}, ["together"]),
        ({"token_mask": [True] * 5}, ["token_mask", "(6,)", "(5,)"]),
        ({"token_mask": [False] * 6}, ["keeps nothing"]),
        ({"segment_mask": torch.ones(6, SEGMENTS)}, ["segment_mask must be boolean"]),
        ({"token_mask": [True] * 6, "adapter_name": "nobody"}, ["adapter_name='nobody'", "default"]),
    ],
)
def test_an_error_names_what_is_wrong_and_changes_nothing(arguments, words):
    model = adapted()
    before = model(pixel_values=images()).logits
    with pytest.raises(ValueError) as raised:
        prune_prompts(model, **arguments)
    for word in words:
        assert word in str(raised.value)
    assert torch.equal(model(pixel_values=images()).logits, before)
    assert model.peft_config["default"].token_mask is None


def with_nan(name, *where):
    values = {"tokens": torch.rand(6), "segments": torch.rand(6, SEGMENTS)}
    for index in where:
        values[name][index] = float("nan")
    return PromptScores(**values)


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        (with_nan("tokens", 1, 4), ValueError, r"scores\.tokens is NaN for 2 of 6"),
        (
            with_nan("segments", (0, 1), 3),
            ValueError,
            rf"scores\.segments is NaN for {SEGMENTS + 1} of {6 * SEGMENTS}",
        ),
        (PromptScores(torch.rand(6) * 1j, torch.rand(6, SEGMENTS)), TypeError, r"scores\.tokens .*complex64"),
        (PromptScores(torch.rand(6), torch.rand(6, SEGMENTS) > 0), TypeError, r"scores\.segments .*bool"),
        (PromptScores([0.0] * 6, torch.rand(6, SEGMENTS)), TypeError, r"scores\.tokens .* not list"),
        (PromptScores(torch.rand(1), torch.rand(6, SEGMENTS)), ValueError, r"scores\.tokens .*\(6,\).*\(1,\)"),
        (PromptScores(torch.rand(6), torch.rand(6)), ValueError, r"scores\.segments .*\(6, 8\).*\(6,\)"),
    ],
)
def test_scores_that_rank_nothing_are_refused_and_change_nothing(bad, error, words):
    model = adapted()
    before = model(pixel_values=images()).logits
    with pytest.raises(error, match=words):
        prune_prompts(model, bad, token_rate=0.5, segment_rate=0.5)
    with pytest.raises(error, match=words):
        PromptedAdapter.find(model).masks.prune(bad, rates=(0.5, 0.5), minimum=(1, 1))
    assert torch.equal(model(pixel_values=images()).logits, before)
    assert model.peft_config["default"].token_mask is None


def test_infinite_scores_are_pruned_first_or_last():
    model = adapted()
    tokens = torch.tensor([0.0, float("inf"), -9.0, float("-inf"), 9.0, 1.0])
    prune_prompts(model, PromptScores(tokens, torch.zeros(6, SEGMENTS)), token_count=1)
    assert model.peft_config["default"].token_mask == [True, True, True, False, True, True]
    prune_prompts(model, PromptScores(tokens[tokens > float("-inf")], torch.zeros(5, SEGMENTS)), token_count=4)
    assert model.peft_config["default"].token_mask == [False, True, False, False, False, False]


def test_what_is_pruned_already_needs_no_score():
    model = adapted()
    prune_prompts(model, segment_mask=[[False] + [True] * (SEGMENTS - 1)] * 6)
    prune_prompts(model, with_nan("segments", (slice(None), 0)), segment_count=1)
    assert {sum(row) for row in model.peft_config["default"].segment_mask} == {SEGMENTS - 2}


@both_depths
def test_whatever_masks_are_set_an_adapter_is_refused_or_can_be_saved_and_loaded(depth, tmp_path_factory):
    """By hand in a new config, or by pruning once or twice; with key-value prompts beside them or without."""
    whole = {"num_visual_prompts": 2, "num_segments": 2, "visual_prompt_depth": depth, "layers_to_transform": [0]}
    mask = st.lists(st.booleans(), min_size=2, max_size=2)
    step = st.tuples(mask, st.lists(mask, min_size=2, max_size=2))
    backbone = tiny_vit()
    nothing = ([True, False], [[False, False], [True, True]])  # of each a part, of both together nothing

    def make(**fields):
        return get_peft_model(copy.deepcopy(backbone), E2VPTConfig(**whole, **fields)).eval()

    @settings(max_examples=25, deadline=None)
    @given(st.lists(step, min_size=1, max_size=2), st.booleans(), st.booleans())
    @example([nothing], True, True)
    @example([nothing], False, False)
    @example([([True, True], nothing[1]), ([True, False], [[True, True]] * 2)], False, True)
    def check(steps, by_config, kv):
        model = None if by_config else make(num_kv_prompts=int(kv))
        kept = torch.ones(2, 2, dtype=torch.bool)
        tokens = torch.tensor([True, True])
        for token_mask, segment_mask in steps[: 1 if by_config else 2]:
            left = int(tokens.sum())
            masks = {"token_mask": token_mask[:left], "segment_mask": segment_mask[:left]}
            where = tokens.nonzero()[:, 0]
            kept[where] &= torch.tensor(masks["segment_mask"])
            tokens[where] = torch.tensor(masks["token_mask"])
            kept &= tokens[:, None]
            try:
                if by_config:
                    model = make(num_kv_prompts=int(kv), **masks)
                else:
                    prune_prompts(model, **masks)
            except ValueError as error:
                assert "keeps nothing" in str(error) or "keep no segment" in str(error)
                return
            assert kept.any(), "what keeps nothing must have been refused"
        folder = tmp_path_factory.mktemp("adapter")
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(copy.deepcopy(backbone), folder)
        assert torch.equal(loaded(pixel_values=images()).logits, model(pixel_values=images()).logits)
        assert torch.equal(PromptedAdapter.find(loaded).masks.segments, kept)

    check()


def test_key_value_prompts_alone_cannot_be_pruned():
    model = get_peft_model(tiny_vit(), E2VPTConfig(num_visual_prompts=0))
    with pytest.raises(ValueError, match="no visual prompts"):
        prune_prompts(model, token_mask=[True])


def test_the_summary_prints_well():
    text = str(prune_prompts(adapted(), scores(), token_rate=0.5, segment_rate=0.5))
    assert "adapter 'default'" in text
    assert "visual prompts          6 ->          3  (50.0% left)" in text
    assert "segments               48 ->         12  (25.0% left)" in text


@both_depths
def test_a_summary_tells_what_is_left_before_anything_is_pruned(depth):
    model = adapted(depth)
    adapter = PromptedAdapter.find(model)
    before = model(pixel_values=images()).logits
    masks = adapter.masks.prune(scores(), rates=(0.5, 0.5), minimum=(1, 2))
    promised = PruningSummary.of(adapter, masks)
    assert torch.equal(model(pixel_values=images()).logits, before)
    assert prune_prompts(model, scores(), token_rate=0.5, segment_rate=0.5) == promised
    assert adapter.masks == masks
    assert promised.parameters_after == sum(p.numel() for p in prompt_parameters(model).values())


def test_a_quarter_of_the_segments_stays_unless_told_otherwise():
    assert [least_segments(segments) for segments in (1, 4, 5, 8, 16)] == [1, 1, 2, 2, 4]
    every = PromptScores(torch.rand(6), torch.rand(6, 16))
    assert prune_prompts(adapted(num_segments=16), every, segment_rate=1.0).segments_after == 6 * 4
