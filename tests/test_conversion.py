"""Visual prompts that become key-value prompts: the same function, without anything of the backbone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from e2vpt_peft import E2VPTConfig, convert_to_kv_prompts, keep_prefixes, prune_prompts, rewind_prompts
from e2vpt_peft.config import MAX_PROMPTS

from .support.adapted import adapt, assert_close, inputs, make, run, tensors
from .support.models import BESIDE, images, prompt_parameters, tiny_vit
from .support.zoo import HEADS, ZOO

KINDS: dict[str, dict[str, Any]] = {
    "shared": {},
    "separate": {"share_kv_prompts": False},
    "visual alone": {"num_kv_prompts": 0},
    "some layers": {"layers_to_transform": [1, 2]},
    "with dropout": {"prompt_dropout": 0.5, "kv_prompt_dropout": 0.5},
}
TOKENS = torch.tensor([True, False, True, True])
SEGMENTS = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 0], [1, 1, 1, 1]]).bool()


def config(**fields: Any) -> E2VPTConfig:
    return E2VPTConfig(**{"num_visual_prompts": 4, "num_kv_prompts": 3, "num_segments": 4, **fields})


def randomize(model: nn.Module) -> None:
    """Give all that belongs to adapters values that are nobody's initial ones."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("e2vpt_", "lora_", "modules_to_save")):
                parameter.copy_(torch.randn(parameter.shape))


def adapted(backbone: nn.Module | None = None, **fields: Any) -> PeftModel:
    model = get_peft_model(tiny_vit() if backbone is None else backbone, config(**fields)).eval()
    randomize(model)
    return model


@torch.no_grad()
def logits(model: nn.Module, **kwargs: Any) -> torch.Tensor:
    return model.eval()(images(), **kwargs).logits


@pytest.mark.parametrize("name", [*ZOO, *HEADS])
@torch.no_grad()
def test_every_architecture_gives_what_it_gave(name: str) -> None:
    model = adapt(make(name))
    expected = tensors(run(model, inputs(name)))
    convert_to_kv_prompts(model)
    assert_close(tensors(run(model, inputs(name))), expected)
    with model.disable_adapter():
        bare = tensors(run(model, inputs(name)))
    assert not all(torch.allclose(mine, theirs, atol=1e-3) for mine, theirs in zip(bare, expected))


@pytest.mark.parametrize("is_pruned", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_prompts_gives_the_same_bits(kind: str, is_pruned: bool) -> None:
    model = adapted(**KINDS[kind])
    if is_pruned:
        prune_prompts(model, token_mask=TOKENS, segment_mask=SEGMENTS)
    expected = logits(model)
    convert_to_kv_prompts(model.train())
    assert all(module.training for module in model.modules())
    assert torch.equal(logits(model), expected)
    visual = 3 if is_pruned else 4
    parameters = prompt_parameters(model)
    assert all("e2vpt_kv_prompts" in name for name in parameters)
    count = visual + KINDS[kind].get("num_kv_prompts", 3)
    assert {tuple(parameter.shape) for parameter in parameters.values()} == {(2, 4, count, 8)}


def test_the_configuration_is_that_of_separate_key_value_prompts_alone() -> None:
    model = adapted(modules_to_save=["classifier"])
    prune_prompts(model, token_mask=TOKENS, segment_mask=SEGMENTS)
    before = model.peft_config["default"]
    convert_to_kv_prompts(model)
    after = model.peft_config["default"]
    changed = {name for name, value in vars(after).items() if value != vars(before)[name]}
    assert changed == {"num_visual_prompts", "num_kv_prompts", "share_kv_prompts", "token_mask", "segment_mask"}
    assert (after.num_visual_prompts, after.num_kv_prompts, after.share_kv_prompts) == (0, 6, False)
    assert before.num_visual_prompts == 4


def test_it_is_saved_and_loaded_as_what_it_is(tmp_path: Any) -> None:
    model = adapted(modules_to_save=["classifier", "layernorm_before"])
    expected = logits(model)
    convert_to_kv_prompts(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path)
    assert torch.equal(logits(loaded), expected)
    assert not any(name for name in prompt_parameters(loaded) if "visual" in name)


def test_a_pass_that_is_recorded_computes_nothing_of_the_backbone_for_its_prompts() -> None:
    def linear_layers(model: nn.Module) -> int:
        graph = torch.export.export(model.eval(), (), {"pixel_values": images()}).graph
        return sum(node.target == torch.ops.aten.linear.default for node in graph.nodes)

    bare, model = linear_layers(tiny_vit()), adapted()
    assert linear_layers(model) > bare
    convert_to_kv_prompts(model)
    assert linear_layers(model) == bare


@pytest.mark.parametrize("are_kept", [False, True])
def test_an_adapter_that_is_not_active_is_converted_through_its_own_norms(are_kept: bool) -> None:
    norms = ["classifier", "layernorm_before"]
    model = adapted(modules_to_save=norms)
    model.add_adapter("other", config(num_visual_prompts=2, modules_to_save=norms))
    model.add_adapter("third", config(num_visual_prompts=0, modules_to_save=norms, **BESIDE))
    randomize(model)
    keep_prefixes(model, are_kept)
    names = ["other", "default", "third"]
    mixed, alone = logits(model, adapter_names=names), logits(model)
    default = {name: value for name, value in prompt_parameters(model).items() if "other" not in name}
    convert_to_kv_prompts(model, "other")
    torch.testing.assert_close(logits(model, adapter_names=names), mixed, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(model), alone)
    after = {name: value for name, value in prompt_parameters(model).items() if "other" not in name}
    assert after.keys() == default.keys()
    assert all(value is default[name] for name, value in after.items())


def test_another_model_of_the_same_configuration_is_not_touched() -> None:
    shared = config()
    model, other = (get_peft_model(tiny_vit(), shared) for _ in range(2))
    expected = logits(other)
    convert_to_kv_prompts(model)
    assert other.peft_config["default"] is shared
    assert shared.num_visual_prompts == 4
    assert torch.equal(logits(other), expected)


def test_what_lies_beneath_is_part_of_it() -> None:
    beneath = get_peft_model(tiny_vit(), LoraConfig(target_modules=["k_proj", "v_proj"]), adapter_name="beneath")
    model = adapted(beneath)
    without = adapted()
    without.load_state_dict(model.state_dict(), strict=False)
    expected = logits(model)
    for each in (model, without):
        convert_to_kv_prompts(each, "default")
    assert torch.equal(logits(model), expected)
    pairs = zip(prompt_parameters(model).values(), prompt_parameters(without).values(), strict=True)
    assert not any(torch.allclose(mine, theirs) for mine, theirs in pairs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_type_gives_the_same_bits(dtype: torch.dtype) -> None:
    model = adapted(tiny_vit().to(dtype))
    pixels = images(dtype=dtype)
    with torch.no_grad():
        expected = model(pixels).logits
        types = {parameter.dtype for parameter in prompt_parameters(model).values()}
        convert_to_kv_prompts(model)
        assert torch.equal(model(pixels).logits, expected)
    assert {parameter.dtype for parameter in prompt_parameters(model).values()} == types


@torch.no_grad()
def test_half_precision_without_a_norm_in_front_of_the_attention() -> None:
    """Where there is none, prompts of float32 go to projections of another type."""
    model = adapt(make("bert").to(torch.bfloat16))
    expected = tensors(run(model, inputs("bert")))
    convert_to_kv_prompts(model)
    for mine, theirs in zip(tensors(run(model, inputs("bert"))), expected, strict=True):
        assert torch.equal(mine, theirs)


def test_training_goes_on_if_it_did_before() -> None:
    model = adapted()
    convert_to_kv_prompts(model)
    model.train()(images()).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in prompt_parameters(model).values())
    frozen = adapted(inference_mode=True)
    convert_to_kv_prompts(frozen)
    assert not any(parameter.requires_grad for parameter in prompt_parameters(frozen).values())


def test_nothing_of_visual_prompts_is_left() -> None:
    model = adapted()
    prune_prompts(model, token_mask=TOKENS, segment_mask=SEGMENTS)
    convert_to_kv_prompts(model)
    for refused in (convert_to_kv_prompts, rewind_prompts):
        with pytest.raises(ValueError, match="Adapter 'default' has no visual prompts: there is nothing to"):
            refused(model)
    assert not any("segment_mask" in name or "visual" in name for name in model.state_dict())
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


@pytest.mark.parametrize(
    ("make_model", "words"),
    [
        (
            lambda: adapted(num_visual_prompts=0),
            "has no visual prompts: there is nothing to score, to prune, to compare or to convert",
        ),
        (lambda: adapted(visual_prompt_depth="shallow"), "visual_prompt_depth='shallow': such prompts are changed"),
        (lambda: adapted(**BESIDE), "kv_prompt_activation='gelu', which its visual prompts"),
        (lambda: adapted(num_kv_prompts=MAX_PROMPTS, layers_to_transform=[0]), "num_kv_prompts=10004 must be 10000"),
        (tiny_vit, "adapter_name is needed: the active E2VPT adapters are"),
    ],
)
def test_what_cannot_be_converted_is_refused_and_left_alone(make_model: Any, words: str) -> None:
    model = make_model()
    parameters = prompt_parameters(model)
    before = copy.deepcopy(getattr(model, "peft_config", None))
    with pytest.raises(ValueError, match=words):
        convert_to_kv_prompts(model)
    assert getattr(model, "peft_config", None) == before
    after = prompt_parameters(model)
    assert after.keys() == parameters.keys()
    assert all(value is parameters[name] for name, value in after.items())


def test_a_disabled_adapter_is_refused() -> None:
    model = adapted(modules_to_save=["layernorm_before"])
    with model.disable_adapter(), pytest.raises(ValueError, match="is disabled: convert it outside"):
        convert_to_kv_prompts(model)
    convert_to_kv_prompts(model)
