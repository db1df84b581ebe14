"""Different adapters in one batch: each sample gets what its adapter gives it alone."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn.attention.flex_attention import flex_attention

from e2vpt_peft import E2VPTConfig, keep_prefixes
from e2vpt_peft.route import Route
from e2vpt_peft.running_pass import RunningPass, passes_of

from .support.bare import Bare
from .support.flex import skip_where_torch_is_wrong
from .support.models import BESIDE, TINY_MODELS, images, tiny_vit

DEEP: dict[str, dict[str, Any]] = {
    "flowers": {"num_visual_prompts": 6, "num_kv_prompts": 2},
    "digits": {"num_visual_prompts": 3, "num_kv_prompts": 4, "share_kv_prompts": False},
    "visual": {"num_visual_prompts": 2, "num_kv_prompts": 0},
    "kv": {"num_visual_prompts": 0, "num_kv_prompts": 5},
}
SHALLOW = {name: {**config, "visual_prompt_depth": "shallow"} for name, config in DEEP.items()}
BOTH_DEPTHS = {"flowers": DEEP["flowers"], "digits": SHALLOW["digits"], "visual": SHALLOW["visual"], "kv": DEEP["kv"]}
SAME_COUNTS = {name: {"num_visual_prompts": 4, "num_kv_prompts": 2} for name in DEEP}
SOME_BESIDE = {
    "flowers": {**DEEP["flowers"], **BESIDE},
    "digits": DEEP["digits"],
    "visual": DEEP["visual"],
    "kv": {**DEEP["kv"], **BESIDE},
}
ALL_BESIDE = dict.fromkeys(DEEP, SOME_BESIDE["kv"])
SOME_LAYERS = {
    "flowers": {"layers_to_transform": [0]},
    "digits": {"layers_to_transform": [1, 2], "num_visual_prompts": 3},
    "visual": {"layers_to_transform": [2], "num_kv_prompts": 0},
    "kv": {"num_visual_prompts": 0},
}
SOME_LAYERS_SHALLOW = {name: {**config, "visual_prompt_depth": "shallow"} for name, config in SOME_LAYERS.items()}
MIXES = {
    "deep": DEEP,
    "shallow": SHALLOW,
    "both depths": BOTH_DEPTHS,
    "same counts": SAME_COUNTS,
    "beside": SOME_BESIDE,
    "all beside": ALL_BESIDE,
    "some layers": SOME_LAYERS,
    "some layers, shallow": SOME_LAYERS_SHALLOW,
}
NAMES = ["flowers", "__base__", "digits", "kv", "flowers", "visual", "__base__"]


def adapted(model: Any, configs: dict[str, dict[str, Any]], heads: Sequence[str] = ("classifier",)) -> PeftModel:
    """A model with several adapters, whose prompts and heads are all random."""
    peft_model = None
    for name, config in configs.items():
        config = E2VPTConfig(**{"modules_to_save": list(heads) or None, **config})
        if peft_model is None:
            peft_model = get_peft_model(model, config, adapter_name=name)
        else:
            peft_model.add_adapter(name, config)
    assert peft_model is not None
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "e2vpt_" in name or ".modules_to_save." in name:
                parameter.normal_(std=0.5)
    return peft_model.eval()


@torch.no_grad()
def alone(model: PeftModel, pixel_values: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
    """Each sample by itself, with its adapter active."""
    logits = []
    before = model.active_adapters
    for sample, name in zip(pixel_values.split(1), names):
        if name == "__base__":
            with model.disable_adapter():
                logits.append(model(pixel_values=sample).logits)
        else:
            model.set_adapter(name)
            logits.append(model(pixel_values=sample).logits)
    model.base_model.set_adapter(before)
    return torch.cat(logits)


@torch.no_grad()
def together(model: PeftModel, pixel_values: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
    return model(pixel_values=pixel_values, adapter_names=list(names)).logits


def assert_mixed_batch_is_right(model: PeftModel, names: Sequence[str] = NAMES) -> None:
    pixel_values = images(len(names))
    expected = alone(model, pixel_values, names)
    assert (expected[0] - alone(model, pixel_values[:1], ["__base__"])).abs().max() > 1e-2
    torch.testing.assert_close(together(model, pixel_values, names), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mix", MIXES)
def test_each_sample_gets_what_its_adapter_gives_it_alone(mix: str, attention: str) -> None:
    model = adapted(tiny_vit(attn_implementation=attention), MIXES[mix])
    assert_mixed_batch_is_right(model)
    keep_prefixes(model, False)
    assert_mixed_batch_is_right(model)


def test_several_active_adapters_are_read_side_by_side() -> None:
    """In the softmax and beside it, whatever their order."""
    model = adapted(tiny_vit(), SOME_BESIDE, heads=())
    with torch.no_grad():
        logits = []
        for names in (["flowers", "digits", "kv"], ["kv", "digits", "flowers"]):
            model.base_model.set_adapter(names)
            logits.append(model(pixel_values=images()).logits)
            keep_prefixes(model, False)
            logits.append(model(pixel_values=images()).logits)
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("first", [0, 1])
def test_the_first_adapted_block_of_a_stack_counts_the_samples(first: int) -> None:
    configs = {"flowers": {"layers_to_transform": list(range(first, 3))}, "digits": {"layers_to_transform": [2]}}
    model = adapted(tiny_vit(), configs)
    hooked = [bool(block._forward_pre_hooks) for block in model.get_base_model().vit.layers]
    assert hooked == [index == first for index in range(3)]
    with pytest.raises(ValueError, match=rf"a batch of 4 arrives at 'vit.layers.{first}'"):
        together(model, images(4), ["flowers", "digits"])


def test_a_stack_whose_first_blocks_are_cut_off_counts_where_it_can() -> None:
    model = adapted(tiny_vit(), DEEP)
    vit = model.get_base_model().vit
    vit.layers = vit.layers[1:]
    assert_mixed_batch_is_right(model)
    with pytest.raises(ValueError, match="a batch of 14 arrives at 'vit.layers'"):
        together(model, images(14), NAMES)


@pytest.mark.parametrize("architecture", ["deit", "dinov2"])
@pytest.mark.parametrize("mix", ["deep", "shallow"])
def test_other_architectures(architecture: str, mix: str) -> None:
    assert_mixed_batch_is_right(adapted(TINY_MODELS[architecture](), MIXES[mix]))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("mix", ["deep", "beside", "both depths", "some layers, shallow"])
def test_flex_attention(mix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers compiles flex attention, which takes seconds for every shape.
    monkeypatch.setattr(
        "transformers.integrations.flex_attention.compile_friendly_flex_attention",
        lambda query, key, value, training=False, **kwargs: flex_attention(query, key, value, **kwargs),
    )
    assert_mixed_batch_is_right(adapted(tiny_vit(attn_implementation="flex_attention"), MIXES[mix]))


@pytest.mark.slow
def test_compiled_flex_attention() -> None:
    skip_where_torch_is_wrong()
    assert_mixed_batch_is_right(adapted(tiny_vit(attn_implementation="flex_attention"), DEEP))


@pytest.mark.parametrize("names", [["kv"] * 3, ["__base__"] * 3, ["flowers"], ["__base__", "kv"]])
def test_batches_of_few_kinds(names: list[str]) -> None:
    model = adapted(tiny_vit(), DEEP)
    pixel_values = images(len(names))
    torch.testing.assert_close(
        together(model, pixel_values, names), alone(model, pixel_values, names), atol=1e-5, rtol=0
    )


def test_one_adapter_for_all_samples_equals_that_adapter_active() -> None:
    model = adapted(tiny_vit(), DEEP)
    model.set_adapter("digits")
    pixel_values = images(4)
    torch.testing.assert_close(model(pixel_values).logits, model(pixel_values, adapter_names=["digits"] * 4).logits)


@pytest.mark.parametrize("active", DEEP)
def test_the_active_adapter_does_not_matter(active: str) -> None:
    # The wrapper of PEFT ignores adapter_names if the active adapter has no head of its own.
    configs = {**DEEP, "visual": {**DEEP["visual"], "modules_to_save": None}}
    model = adapted(tiny_vit(), configs)
    expected = alone(model, images(len(NAMES)), NAMES)
    model.set_adapter(active)
    torch.testing.assert_close(together(model, images(len(NAMES)), NAMES), expected, atol=1e-5, rtol=0)
    assert model.active_adapters == [active]


def test_a_head_that_only_a_later_adapter_has() -> None:
    configs = {**DEEP, "flowers": {**DEEP["flowers"], "modules_to_save": None}}
    assert_mixed_batch_is_right(adapted(tiny_vit(), configs))


def test_a_copy_of_the_model() -> None:
    model = adapted(tiny_vit(), DEEP)
    expected = together(model, images(len(NAMES)), NAMES)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    torch.testing.assert_close(together(copied, images(len(NAMES)), NAMES), expected)


def test_adapters_without_heads_share_the_original_head() -> None:
    model = adapted(tiny_vit(), DEEP, heads=[])
    assert_mixed_batch_is_right(model)


def test_a_sample_of_the_base_model_goes_through_the_original_head() -> None:
    model = adapted(tiny_vit(), DEEP)
    logits = together(model, images(2), ["__base__", "flowers"])
    torch.testing.assert_close(logits[:1], tiny_vit()(images(2)[:1]).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("heads", [["classifier", "vit.layernorm"], ["classifier", "layernorm_before"]])
def test_other_modules_to_save_follow_the_adapter_too(heads: list[str]) -> None:
    # Visual prompts pass the norm in front of the attention as well.
    assert_mixed_batch_is_right(adapted(tiny_vit(), DEEP, heads=heads))


@pytest.mark.parametrize("visual_prompt_depth", ["deep", "shallow"])
def test_recorded_hidden_states_have_the_shape_of_the_backbone(visual_prompt_depth: str) -> None:
    model = adapted(tiny_vit(), DEEP if visual_prompt_depth == "deep" else SHALLOW)
    out = model(images(len(NAMES)), adapter_names=NAMES, output_hidden_states=True)
    assert {tuple(state.shape) for state in out.hidden_states} == {(len(NAMES), 17, 32)}


def test_bfloat16() -> None:
    model = adapted(tiny_vit().bfloat16(), DEEP).bfloat16()
    pixel_values = images(len(NAMES), dtype=torch.bfloat16)
    logits = together(model, pixel_values, NAMES)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits, alone(model, pixel_values, NAMES), atol=0.2, rtol=0.05)


def test_adapters_whose_names_look_alike() -> None:
    configs = dict(zip(["a", "ab", "b", "a_b"], DEEP.values()))
    assert_mixed_batch_is_right(adapted(tiny_vit(), configs), ["ab", "a", "a_b", "b", "__base__", "a"])


def test_a_loaded_adapter_joins_in(tmp_path: Any) -> None:
    source = adapted(tiny_vit(), DEEP)
    source.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_vit(), tmp_path / "flowers", adapter_name="flowers")
    model.load_adapter(tmp_path / "digits", adapter_name="digits")
    names = ["digits", "flowers", "__base__"]
    model.eval()
    torch.testing.assert_close(together(model, images(3), names), alone(source, images(3), names), atol=1e-5, rtol=0)


# Errors


def test_training_mode_is_refused() -> None:
    model = adapted(tiny_vit(), DEEP).train()
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        model(images(2), adapter_names=["kv", "kv"])


def test_unknown_adapters_are_named() -> None:
    model = adapted(tiny_vit(), DEEP)
    with pytest.raises(ValueError, match=r"\['rocks'\].*'flowers'"):
        model(images(2), adapter_names=["kv", "rocks"])


def test_a_string_is_no_list_of_names() -> None:
    model = adapted(tiny_vit(), DEEP)
    with pytest.raises(TypeError, match="must be a list"):
        model(images(2), adapter_names="kv")


@pytest.mark.parametrize("names", [[], ["kv"], ["kv"] * 2, ["__base__"] * 3, ["kv"] * 8])
@pytest.mark.parametrize("by_keyword", [True, False])
def test_a_wrong_number_of_names_is_refused_before_the_first_adapted_layer(names: list[str], by_keyword: bool) -> None:
    model = adapted(tiny_vit(), DEEP)

    def refuse(*args: Any) -> None:
        raise AssertionError("an adapted layer has been run")

    model.base_model.model.vit.layers[0].attention.register_forward_pre_hook(refuse)
    with pytest.raises(ValueError, match=rf"has {len(names)} names, but a batch of 4 arrives at 'vit.layers.0'"):
        if by_keyword:
            model(labels=torch.zeros(4, dtype=torch.long), pixel_values=images(4), adapter_names=names)
        else:
            model(images(4), adapter_names=names)


def test_heads_with_different_numbers_of_classes_are_refused_in_words() -> None:
    model = adapted(tiny_vit(), DEEP)
    model.base_model.model.classifier.modules_to_save["kv"] = nn.Linear(32, 7)
    with pytest.raises(ValueError, match=r"'flowers': \(5,\), 'kv': \(7,\)"):
        model(images(2), adapter_names=["kv", "flowers"])
    assert model(images(2), adapter_names=["kv", "kv"]).logits.shape == (2, 7)


def test_modules_to_save_that_cannot_be_divided_are_refused_in_words() -> None:
    # A layer takes more than the hidden states, in some models with a batch dimension and in some without.
    model = adapted(tiny_vit(), DEEP, heads=["classifier", "layers.2.mlp"])
    assert_mixed_batch_is_right(model)
    wrapper = model.base_model.model.vit.layers[2].mlp
    with (
        passes_of(model).running(route=Route(["kv", "flowers"])),
        pytest.raises(TypeError, match="ViTMLP.*single tensor"),
    ):
        wrapper(images(2), images(2))


def test_nothing_leaks_when_the_forward_pass_fails() -> None:
    model = adapted(tiny_vit(), DEEP)
    pixel_values = images(len(NAMES))
    plain, mixed = model(pixel_values).logits, together(model, pixel_values, NAMES)
    broken = model.base_model.model.vit.layers[1]
    handle = broken.register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        together(model, pixel_values, NAMES)
    handle.remove()
    assert passes_of(model).current == RunningPass()
    assert torch.equal(model(pixel_values).logits, plain)
    assert torch.equal(together(model, pixel_values, NAMES), mixed)


def test_a_call_registers_nothing_on_the_model() -> None:
    model = adapted(tiny_vit(), DEEP)
    together(model, images(len(NAMES)), NAMES)

    def count_hooks() -> int:
        return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())

    during = []
    before = count_hooks()
    handle = model.base_model.model.vit.layers[1].register_forward_pre_hook(lambda *args: during.append(count_hooks()))
    together(model, images(len(NAMES)), NAMES)
    handle.remove()
    assert during == [before + 1]
    assert count_hooks() == before


# Threads


def test_threads_that_share_a_model_get_their_own_results() -> None:
    model = adapted(tiny_vit(), DEEP)
    pixel_values = images(4)
    batches: list[list[str] | None] = [
        ["kv", "flowers", "__base__", "digits"],
        ["digits", "kv", "kv", "visual"],
        ["__base__"] * 4,
        None,
    ]
    with torch.no_grad():
        expected = [model(pixel_values, adapter_names=names).logits for names in batches]
    # Every thread stops in the middle of the model until all are there, so that the passes do overlap.
    barrier = threading.Barrier(len(batches))

    def wait_for_the_others(*args: Any) -> None:
        barrier.wait(30)

    model.base_model.model.vit.layers[1].register_forward_pre_hook(wait_for_the_others)
    wrong: list[int] = []

    def run(worker: int) -> None:
        with torch.no_grad():
            for _ in range(5):
                logits = model(pixel_values, adapter_names=batches[worker]).logits
                if (logits - expected[worker]).abs().max() > 1e-6:
                    wrong.append(worker)

    threads = [threading.Thread(target=run, args=(worker,)) for worker in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert not barrier.broken
    assert passes_of(model).current == RunningPass()


class BareWithAHead(Bare):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(super().forward(x)[:, 0])


def test_a_batch_without_samples_gives_no_logits() -> None:
    sizes = {"target_modules": ["attn"], "attention_norm": "ln_1", "num_segments": 4}
    model = adapted(BareWithAHead(), {"a": sizes, "b": sizes}, ["head"])
    assert model(torch.randn(0, 5, 8), adapter_names=[]).shape == (0, 3)
