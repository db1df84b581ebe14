"""Projected prefixes are computed once for many inferences; that they are never out of date is tested in
`soak/kept_prefixes.py`."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.multiprocessing.reductions import StorageWeakRef

from e2vpt_peft import E2VPTConfig, E2VPTLayer, keep_prefixes
from examples.benchmarks.measuring.operations import OperationCounter, count_operations

from .soak.kept_prefixes import walk
from .support.models import images, prompt_parameters, tiny_vit
from .test_mixed_batch import DEEP, MIXES, SAME_COUNTS, adapted, alone

LAYERS = 3


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
    """The adapters whose rows were computed, of each call."""
    calls: list[list[str]] = []
    compute = E2VPTLayer._compute_rows

    def noted(layer: E2VPTLayer, adapters: list[str], *args: Any) -> Any:
        calls.append(list(adapters))
        return compute(layer, adapters, *args)

    monkeypatch.setattr(E2VPTLayer, "_compute_rows", noted)
    yield calls


def stores(model: torch.nn.Module) -> list[torch.Tensor]:
    layers = [module for module in model.modules() if isinstance(module, E2VPTLayer)]
    return [store.storage for layer in layers for store in layer.kept_prefixes._stores.values()]


def one(**config: Any) -> PeftModel:
    return get_peft_model(tiny_vit(), E2VPTConfig(num_visual_prompts=4, num_kv_prompts=2, **config)).eval()


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_a_second_inference_computes_no_prefix(guard: Any, computed: list[list[str]]) -> None:
    model = one()
    with guard():
        first = model(pixel_values=images()).logits
        assert len(computed) == LAYERS
        assert torch.equal(model(pixel_values=images()).logits, first)
    assert len(computed) == LAYERS
    keep_prefixes(model, False)
    with guard():
        torch.testing.assert_close(model(pixel_values=images()).logits, first)
    assert len(computed) == 2 * LAYERS


@torch.no_grad()
def test_each_row_is_normed_as_the_running_pass_norms() -> None:
    """With an adapter's norm in modules_to_save: in a mixed batch its own rows, else those of all active adapters."""
    prompts = {"num_visual_prompts": 3, "num_kv_prompts": 2}
    configs = {"a": prompts, "b": {**prompts, "modules_to_save": None}}
    model = adapted(tiny_vit(), configs, ["layernorm_before"])
    for name, parameter in model.named_parameters():
        if "layernorm_before" in name:
            parameter.add_(torch.randn_like(parameter))

    def everything() -> list[torch.Tensor]:
        found = []
        for active in (["b"], ["a", "b"], ["b"], ["a"]):
            model.base_model.set_adapter(active)
            found.append(model(pixel_values=images()).logits)
            found.append(model(pixel_values=images(), adapter_names=["b", "a", "b"]).logits)
        return found

    kept = everything()
    assert len(stores(model)) == LAYERS
    keep_prefixes(model, False)
    for with_kept, without in zip(kept, everything(), strict=True):
        torch.testing.assert_close(with_kept, without)


@torch.no_grad()
def test_after_a_change_of_a_norm_prefixes_are_computed_once_more(computed: list[list[str]]) -> None:
    model = one()
    model(pixel_values=images())
    for layer in model.get_base_model().vit.layers:
        layer.layernorm_before.weight.mul_(1.5)
    for _ in range(3):
        model(pixel_values=images())
    assert len(computed) == 2 * LAYERS


def test_training_and_gradients_keep_nothing(computed: list[list[str]]) -> None:
    model = one()
    for _ in range(2):
        model(pixel_values=images())
    with torch.no_grad():
        model.train()
        model(pixel_values=images())
    assert len(computed) == 3 * LAYERS
    assert stores(model) == []


def test_an_inference_has_two_concatenations_in_each_layer_beside_the_operations_of_the_backbone() -> None:
    counts = []
    for model in (tiny_vit().eval(), one(modules_to_save=["classifier"])):
        with torch.inference_mode():
            counts.append(count_operations(partial(model, pixel_values=images())))
    assert counts[1] - counts[0] == {"aten.cat": 2 * LAYERS}


@pytest.mark.parametrize("configs", [DEEP, SAME_COUNTS], ids=["different counts", "same counts"])
def test_a_mixed_batch_is_one_index_select_in_each_layer(configs: Any, computed: list[list[str]]) -> None:
    model = adapted(tiny_vit(), configs)
    pixels = images(5)
    with torch.inference_mode():
        for names in (["flowers", "kv", "digits", "visual", "flowers"], ["kv", "kv", "visual", "digits", "flowers"]):
            with OperationCounter() as operations:
                found = model(pixel_values=pixels, adapter_names=names).logits
            torch.testing.assert_close(found, alone(model, pixels, names), rtol=1e-5, atol=1e-5)
    assert operations.counts["aten.index_select"] <= LAYERS + 2
    assert len(computed) == LAYERS


@pytest.mark.parametrize("mix", MIXES)
def test_any_mix_with_kept_prefixes_is_what_it_is_without(mix: str) -> None:
    model = adapted(tiny_vit(), MIXES[mix])
    pixels, names = images(6), ["visual", "__base__", "flowers", "kv", "flowers", "digits"]
    with torch.no_grad():
        found = [model(pixel_values=pixels, adapter_names=names).logits for _ in range(2)]
        keep_prefixes(model, False)
        expected = model(pixel_values=pixels, adapter_names=names).logits
    for logits in found:
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_a_sample_without_prompts_does_not_see_those_of_others() -> None:
    """Not even as NaN: a row that is hidden still takes part in a product."""
    model = adapted(tiny_vit(), DEEP)
    pixels, names = images(2), ["__base__", "visual"]
    with torch.no_grad():
        expected = copy.deepcopy(model)(pixel_values=pixels, adapter_names=names).logits
        for name, prompts in prompt_parameters(model).items():
            if name.endswith(("flowers", "digits")):
                prompts.fill_(float("nan"))
        assert model(pixel_values=pixels, adapter_names=["flowers", "digits"]).logits.isnan().all()
        torch.testing.assert_close(model(pixel_values=pixels, adapter_names=names).logits, expected)


def test_only_the_adapter_that_has_changed_is_computed_again(computed: list[list[str]]) -> None:
    model = adapted(tiny_vit(), DEEP)
    names = ["flowers", "digits", "visual"]
    with torch.no_grad():
        model(pixel_values=images(3), adapter_names=names)
        computed.clear()
        for name, prompts in prompt_parameters(model).items():
            if name.endswith("digits"):
                prompts.add_(1)
        found = model(pixel_values=images(3), adapter_names=names).logits
        assert computed == [["digits"]] * LAYERS
        torch.testing.assert_close(found, alone(model, images(3), names))


def test_many_adapters_take_little_more_than_their_rows() -> None:
    config = {"num_visual_prompts": 4, "num_kv_prompts": 2}
    model = adapted(tiny_vit(), {f"task {index}": config for index in range(60)})
    for start in range(0, 60, 3):
        with torch.inference_mode() if start % 2 else torch.no_grad():  # rows of the one come behind the other's
            model(pixel_values=images(3), adapter_names=[f"task {start + index}" for index in range(3)])
    rows = 60 * LAYERS * 2 * 6 * 32
    assert rows <= sum(storage.numel() for storage in stores(model)) <= 1.08 * rows


def test_threads_find_the_prefixes_of_their_own_adapters() -> None:
    model = adapted(tiny_vit(), {f"task {index}": DEEP["flowers"] for index in range(8)})
    pixels = images(2)
    expected = {}
    for index in range(8):
        names = [f"task {index}", f"task {(index + 3) % 8}"]
        expected[index] = alone(model, pixels, names)
    model.eval()
    wrong: list[int] = []

    def work(index: int) -> None:
        with torch.inference_mode(index % 2 == 0), torch.no_grad():
            for _ in range(8):
                found = model(pixel_values=pixels, adapter_names=[f"task {index}", f"task {(index + 3) % 8}"]).logits
                if not torch.allclose(found, expected[index], atol=1e-5):
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_prefixes_of_its_own(duplicate: Any) -> None:
    model = one()
    with torch.no_grad():
        before = model(pixel_values=images()).logits
        other = duplicate(model)
        assert stores(other) == []
        for prompts in prompt_parameters(other).values():
            prompts.add_(1)
        assert not torch.allclose(other(pixel_values=images()).logits, before)
        assert torch.equal(model(pixel_values=images()).logits, before)
        keep_prefixes(model, False)
        off = duplicate(model)
        off(pixel_values=images())
        assert stores(off) == []


@torch.no_grad()
def test_each_stream_has_prefixes_of_its_own(computed: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    model = one()
    for number in (1, 2):
        monkeypatch.setattr("e2vpt_peft.kept_prefixes._stream", lambda device, number=number: number)
        model(pixel_values=images())
        assert len(computed) == number * LAYERS
        model(pixel_values=images())
        assert len(computed) == number * LAYERS


def test_autocast_has_prefixes_of_its_own() -> None:
    model = one()
    pixels = images()
    with torch.no_grad():
        plain = model(pixel_values=pixels).logits
        with torch.autocast("cpu", torch.bfloat16):
            kept = [model(pixel_values=pixels).logits for _ in range(2)]
            keep_prefixes(model, False)
            expected = model(pixel_values=pixels).logits
        assert torch.equal(model(pixel_values=pixels).logits, plain)
    for logits in kept:
        assert torch.equal(logits, expected)
        assert not torch.equal(logits.float(), plain.float())


def test_projections_that_another_method_has_wrapped_are_not_kept(computed: list[list[str]]) -> None:
    lora = get_peft_model(tiny_vit(), LoraConfig(target_modules=".*attention.*(key|value|k_proj|v_proj)"))
    model = get_peft_model(lora.base_model.model, E2VPTConfig(num_visual_prompts=4)).eval()
    with torch.no_grad():
        for _ in range(2):
            model(pixel_values=images())
    assert len(computed) == 2 * LAYERS
    assert stores(model) == []


def test_prompts_that_are_brought_in_for_each_call_are_not_kept() -> None:
    """As accelerate does it, which may come after a first inference."""
    model = one()
    with torch.no_grad():
        before = model(pixel_values=images()).logits
        layer: Any = next(module for module in model.modules() if isinstance(module, E2VPTLayer))
        layer.e2vpt_kv_prompts.forward = lambda name: layer.e2vpt_kv_prompts[name] + 1
        assert not torch.allclose(model(pixel_values=images()).logits, before)


def test_what_is_replaced_is_not_held_in_memory() -> None:
    model = adapted(tiny_vit(), DEEP)
    layer: Any = next(module for module in model.modules() if isinstance(module, E2VPTLayer))
    names = ["flowers", "digits"]
    with torch.no_grad():
        model(pixel_values=images(2), adapter_names=names)
        weight = layer.base_layer.get_submodule(layer.site.value_projection).weight
        old = StorageWeakRef(weight.untyped_storage())
        del weight
        setattr(layer.base_layer, layer.site.value_projection, torch.nn.Linear(32, 32))
        model(pixel_values=images(2), adapter_names=names)
    gc.collect()
    assert old.expired()


def test_eval_and_casting_give_the_memory_back() -> None:
    model = one()
    for forget in (lambda: model.eval(), lambda: model.to(torch.float64).float(), lambda: keep_prefixes(model)):
        with torch.no_grad():
            model(pixel_values=images())
        assert len(stores(model)) == LAYERS
        forget()
        assert stores(model) == []


def test_other_prompts_for_one_call_are_used() -> None:
    model = one()
    other = {name: torch.randn_like(prompts) for name, prompts in prompt_parameters(model).items()}
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.load_state_dict(other, strict=False)
        expected = twin(pixel_values=images()).logits
        before = model(pixel_values=images()).logits
        found = torch.func.functional_call(model, other, (), {"pixel_values": images()}).logits
        torch.testing.assert_close(found, expected)
        assert torch.equal(model(pixel_values=images()).logits, before)


@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_a_traced_model_computes_its_prefix(pre_dispatch: bool) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    model = one()
    with torch.no_grad():
        model(pixel_values=images())
        traced = make_fx(lambda pixels: model(pixel_values=pixels).logits, pre_dispatch=pre_dispatch)(images())
        for prompts in prompt_parameters(model).values():
            prompts.add_(1)
        torch.testing.assert_close(traced(images()), model(pixel_values=images()).logits)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_a_compiled_model_follows_changed_prompts_and_norms_in_the_same_graph(guard: Any) -> None:
    model = one()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for change in range(3):
        with guard():
            model(pixel_values=images())  # has kept prefixes from here on
            torch.testing.assert_close(compiled(pixel_values=images()).logits, model(pixel_values=images()).logits)
        with torch.no_grad():
            for prompts in prompt_parameters(model).values():
                prompts.add_(change + 1)
            model.get_base_model().vit.layernorm.weight.mul_(1.5)
    assert counter.frame_count == 1


def test_another_mix_of_the_same_adapters_is_the_same_compiled_graph() -> None:
    model = adapted(tiny_vit(), DEEP)
    counter = torch._dynamo.testing.CompileCounter()
    expected = []
    mixes = (["flowers", "kv", "flowers", "kv"], ["kv", "flowers", "kv", "kv"], ["kv", "kv", "kv", "flowers"])
    with torch.no_grad():
        for names in mixes:
            expected.append(model(pixel_values=images(4), adapter_names=names).logits)
        torch.compiler.reset()
        model.get_base_model().forward = torch.compile(model.get_base_model().forward, backend=counter, fullgraph=True)
        for names, logits in zip(mixes, expected):
            torch.testing.assert_close(model(pixel_values=images(4), adapter_names=names).logits, logits)
    assert counter.frame_count == 1


@pytest.mark.parametrize("seed", range(3))
def test_no_sequence_of_changes_leaves_an_old_prefix(seed: int) -> None:
    walk(seed, steps=12)
