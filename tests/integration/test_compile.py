"""`torch.compile` and `torch.export`: one graph, and no compilation that the bare backbone would not need."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch._dynamo.testing import CompileCounter

from e2vpt_peft import E2VPTConfig, score_prompts
from e2vpt_peft.running_pass import RunningPass, passes_of

from ..support.models import BESIDE, TINY_MODELS, images, prompt_parameters

BATCH_SIZES = (2, 3, 5, 1)
NAMES = ["a", "__base__", "b", "c"]


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tiny(architecture: str = "vit", attention: str = "sdpa", layers: int = 2) -> Any:
    return TINY_MODELS[architecture](attn_implementation=attention, num_hidden_layers=layers)


def adapted(model: Any, **config: Any) -> PeftModel:
    config = {"num_visual_prompts": 4, "num_kv_prompts": 3, "modules_to_save": ["classifier"], **config}
    return get_peft_model(model, E2VPTConfig(**config), adapter_name="a").eval()


def adapted_thrice(**config: Any) -> PeftModel:
    model = adapted(tiny(), **config)
    model.add_adapter("b", E2VPTConfig(num_visual_prompts=2, modules_to_save=["classifier"]))
    model.add_adapter("c", E2VPTConfig(num_visual_prompts=0, **BESIDE))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "e2vpt_" in name or ".modules_to_save." in name:
                parameter.normal_(std=0.5)
    return model.eval()


def count_compilations(model: nn.Module, training: bool = False) -> list[int]:
    """The number of graphs compiled so far, after each of some batch sizes."""
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model.train(training), backend=counter, fullgraph=True)
    counts = []
    for size in BATCH_SIZES:
        compiled(pixel_values=images(size), labels=torch.zeros(size, dtype=torch.long))
        counts.append(counter.frame_count)
    return counts


@pytest.mark.parametrize("visual_prompt_depth", ["deep", "shallow"])
@pytest.mark.parametrize(
    ("architecture", "attention"),
    [
        ("vit", "sdpa"),
        ("vit", "eager"),
        pytest.param("deit", "sdpa", marks=pytest.mark.slow),
        pytest.param("dinov2", "sdpa", marks=pytest.mark.slow),
    ],
)
def test_one_graph_gives_the_same_logits(architecture: str, attention: str, visual_prompt_depth: str) -> None:
    model = adapted(tiny(architecture, attention), visual_prompt_depth=visual_prompt_depth)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images()).logits, model(images()).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("attention", "visual_prompt_depth"), [("sdpa", "deep"), ("eager", "deep"), ("sdpa", "shallow")]
)
def test_one_graph_gives_the_same_gradients(attention: str, visual_prompt_depth: str) -> None:
    model = adapted(tiny(attention=attention), visual_prompt_depth=visual_prompt_depth, prompt_dropout=0.0).train()
    batch = {"pixel_values": images(), "labels": torch.tensor([0, 1, 2])}
    model(**batch).loss.backward()
    expected = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    model.zero_grad()
    torch.compile(model, backend="aot_eager", fullgraph=True)(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-4)
    assert all(expected[name].abs().max() > 0 for name in prompt_parameters(model))


@pytest.mark.parametrize("visual_prompt_depth", ["deep", "shallow"])
def test_dropout_is_drawn_anew_in_compiled_training(visual_prompt_depth: str) -> None:
    model = adapted(tiny(), visual_prompt_depth=visual_prompt_depth, prompt_dropout=0.5, kv_prompt_dropout=0.5)
    compiled = torch.compile(model.train(), backend="aot_eager", fullgraph=True)
    same_image = images(1).expand(3, -1, -1, -1)
    first, second = compiled(same_image).logits, compiled(same_image).logits
    assert not torch.allclose(first, second)
    assert not torch.allclose(first[0], first[1])


@pytest.mark.parametrize(
    ("attention", "visual_prompt_depth", "training"),
    [
        ("sdpa", "deep", True),
        pytest.param("sdpa", "deep", False, marks=pytest.mark.slow),
        pytest.param("eager", "deep", True, marks=pytest.mark.slow),
        pytest.param("sdpa", "shallow", True, marks=pytest.mark.slow),
    ],
)
def test_no_compilation_per_batch_size_beyond_that_of_the_backbone(
    attention: str, visual_prompt_depth: str, training: bool
) -> None:
    backbone = count_compilations(tiny(attention=attention, layers=1), training)
    model = adapted(tiny(attention=attention, layers=1), visual_prompt_depth=visual_prompt_depth)
    assert count_compilations(model, training) == backbone


def test_switching_adapters_after_compilation_takes_effect() -> None:
    model = adapted_thrice()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for name in ["a", "b", "a"]:
        model.set_adapter(name)
        torch.testing.assert_close(compiled(images()).logits, model(images()).logits, atol=1e-5, rtol=0)
    with model.disable_adapter():
        torch.testing.assert_close(compiled(images()).logits, model(images()).logits, atol=1e-5, rtol=0)


def test_switching_the_attention_implementation_after_compilation_takes_effect() -> None:
    model = adapted(tiny())
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(images())
    model.base_model.model.set_attn_implementation("eager")
    logits = compiled(images()).logits
    torch.testing.assert_close(logits, model(images()).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("visual_prompt_depth", ["deep", "shallow"])
def test_recorded_hidden_states(visual_prompt_depth: str) -> None:
    model = adapted(tiny(), visual_prompt_depth=visual_prompt_depth)
    expected = model(
        images(), output_hidden_states=True
    ).hidden_states  # transformers sets up recording, not traceable
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    states = compiled(images(), output_hidden_states=True).hidden_states
    torch.testing.assert_close(states, expected, atol=1e-5, rtol=0)
    assert {tuple(state.shape) for state in states} == {(3, 17, 32)}


@pytest.mark.slow
@pytest.mark.parametrize(("visual_prompt_depth", "layers"), [("deep", 1), ("shallow", 2)])
def test_inductor(visual_prompt_depth: str, layers: int) -> None:
    model = adapted(tiny(layers=layers), visual_prompt_depth=visual_prompt_depth, prompt_dropout=0.0)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images()).logits, model(images()).logits, atol=1e-4, rtol=0)
    batch = {"pixel_values": images(), "labels": torch.tensor([0, 1, 2])}
    torch.testing.assert_close(compiled.train()(**batch).loss, model.train()(**batch).loss, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("method", "layers"), [("removal", 1), ("attention_gate", 1), ("signed", 2)])
def test_prompts_of_a_compiled_model_have_the_same_scores(method: str, layers: int) -> None:
    batch = {"pixel_values": images(), "labels": torch.tensor([0, 1, 2])}
    model = adapted(tiny(layers=layers))
    expected = score_prompts(model, [batch], method, progress_bar=False)
    model.compile(backend="aot_eager")
    actual = score_prompts(model, [batch], method, progress_bar=False)
    torch.testing.assert_close(actual.tokens, expected.tokens, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(actual.segments, expected.segments, atol=1e-6, rtol=1e-4)


# Different adapters in one batch


@pytest.mark.parametrize("visual_prompt_depth", ["deep", pytest.param("shallow", marks=pytest.mark.slow)])
def test_a_mixed_batch_is_one_graph(visual_prompt_depth: str) -> None:
    model = adapted_thrice(visual_prompt_depth=visual_prompt_depth)
    mixed, plain = model(images(4), adapter_names=NAMES).logits, model(images(4)).logits
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images(4), adapter_names=NAMES).logits, mixed, atol=1e-5, rtol=0)
    torch.testing.assert_close(compiled(images(4)).logits, plain, atol=1e-5, rtol=0)
    assert passes_of(model).current == RunningPass()


def test_a_compiled_backbone_is_not_compiled_anew_for_every_mixed_batch() -> None:
    # Compiled with the names, every list of names is another graph. The model inside reads which sample goes where
    # from a tensor. (How many samples an adapter has does matter to modules_to_save.)
    model = adapted_thrice()
    batches = [
        ["a", "a", "b", "b", "c"],
        ["a", "a", "b", "b", "c"],
        ["a", "b", "b", "a", "c"],
        ["c", "b", "b", "a", "a"],
    ]
    expected = [model(images(5), adapter_names=names).logits for names in batches]
    counter = CompileCounter()
    model.base_model.model.compile(backend=counter, fullgraph=True)
    counts = []
    for names, logits in zip(batches, expected):
        out = model(images(5), adapter_names=names).logits
        counts.append(counter.frame_count)
        torch.testing.assert_close(out, logits, atol=1e-5, rtol=0)
    assert counts == [1, 1, 1, 1]


def test_threads_that_share_a_compiled_model_get_their_own_results() -> None:
    model = adapted_thrice()
    batches: list[list[str] | None] = [["a", "b", "c"], ["c", "c", "__base__"], None]
    model.base_model.model.compile(backend="eager", fullgraph=True)
    expected = [model(images(), adapter_names=names).logits for names in batches]  # compiled before the threads start
    wrong: list[int] = []

    def run(worker: int) -> None:
        for _ in range(20):
            out = model(images(), adapter_names=batches[worker]).logits
            if (out - expected[worker]).abs().max() > 1e-6:
                wrong.append(worker)

    threads = [threading.Thread(target=run, args=(worker,)) for worker in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# Export


class Logits(nn.Module):
    """What is exported: a model from an image to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=pixel_values).logits


@pytest.mark.parametrize(
    ("attention", "visual_prompt_depth", "strict"),
    [
        ("sdpa", "deep", True),
        ("sdpa", "deep", False),
        ("sdpa", "shallow", False),
        pytest.param("sdpa", "shallow", True, marks=pytest.mark.slow),
        pytest.param("eager", "deep", True, marks=pytest.mark.slow),
        pytest.param("eager", "shallow", False, marks=pytest.mark.slow),
    ],
)
def test_export_with_any_batch_size(attention: str, visual_prompt_depth: str, strict: bool) -> None:
    model = adapted(tiny(attention=attention), visual_prompt_depth=visual_prompt_depth)
    dynamic = {"pixel_values": {0: torch.export.Dim("batch", min=1, max=64)}}
    program = torch.export.export(Logits(model).eval(), (images(2),), dynamic_shapes=dynamic, strict=strict)
    exported: Callable[[torch.Tensor], torch.Tensor] = program.module()
    for size in (1, 2, 7):
        torch.testing.assert_close(exported(images(size)), model(images(size)).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture", ["deit", "dinov2"])
def test_export_of_other_architectures(architecture: str) -> None:
    model = adapted(TINY_MODELS[architecture]())
    program = torch.export.export(Logits(model).eval(), (images(2),), strict=False)
    torch.testing.assert_close(program.module()(images(2)), model(images(2)).logits, atol=1e-5, rtol=0)


def test_an_exported_model_keeps_its_prompts_when_the_adapter_changes() -> None:
    model = adapted_thrice()
    expected = model(images(2)).logits
    program = torch.export.export(Logits(model).eval(), (images(2),), strict=False)
    model.set_adapter("b")
    torch.testing.assert_close(program.module()(images(2)), expected, atol=1e-5, rtol=0)
