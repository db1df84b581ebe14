"""On a GPU, everything that an adapter goes through gives what it gives on the CPU.

`python -m examples.benchmarks.gpu` runs these, and checks precision, attention kernels, compilation and quantisation.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model

from e2vpt_peft import E2VPTConfig, check_prefix, prune_prompts, rewind_prompts, score_prompts

from ..support.models import images, prompt_parameters, tiny_vit

pytestmark = pytest.mark.gpu
GPU = "cuda"
CLOSE = {"atol": 1e-3, "rtol": 1e-2}  # training magnifies what sums in another order differ by
depths = pytest.mark.parametrize("depth", ["deep", "shallow"])


def adapted(depth: str, **config: int) -> PeftModel:
    sizes = {"num_visual_prompts": 4, "num_kv_prompts": 3, "num_segments": 4, **config}
    torch.manual_seed(0)
    return get_peft_model(
        tiny_vit(), E2VPTConfig(visual_prompt_depth=depth, prompt_dropout=0.0, modules_to_save=["classifier"], **sizes)
    ).eval()


def batch(device: str) -> dict[str, torch.Tensor]:
    return {"pixel_values": images().to(device), "labels": torch.tensor([0, 1, 2], device=device)}


def train(model: PeftModel, device: str) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for _ in range(3):
        model(**batch(device)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def devices(model: PeftModel) -> set[str]:
    return {tensor.device.type for tensor in model.state_dict().values()}


def test_prefixes_are_inserted_tokens() -> None:
    model = adapted("deep").to(GPU)
    assert check_prefix(model, {"pixel_values": images().to(GPU)}) < 1e-3


@depths
@pytest.mark.parametrize("method", ["removal", "absolute", "leave_one_out"])
def test_training_scoring_pruning_and_rewinding(depth: str, method: str) -> None:
    on_cpu = adapted(depth)
    on_gpu = copy.deepcopy(on_cpu).to(GPU)
    for model, device in ((on_cpu, "cpu"), (on_gpu, GPU)):
        train(model, device)
    expected, found = (
        score_prompts(model, [batch(device)], method, progress_bar=False)
        for model, device in ((on_cpu, "cpu"), (on_gpu, GPU))
    )
    torch.testing.assert_close(found.tokens.cpu(), expected.tokens.cpu(), **CLOSE)
    torch.testing.assert_close(found.segments.cpu(), expected.segments.cpu(), **CLOSE)

    for model, device in ((on_cpu, "cpu"), (on_gpu, GPU)):
        prune_prompts(model, expected, token_rate=0.5, segment_rate=0.5)
        train(model, device)
        rewind_prompts(model)
        train(model, device)
    assert devices(on_gpu) == {GPU}
    for name, prompt in prompt_parameters(on_gpu).items():
        torch.testing.assert_close(prompt.cpu(), prompt_parameters(on_cpu)[name], **CLOSE)


@depths
def test_saving_loading_and_adding(depth: str, tmp_path: Path) -> None:
    model = adapted(depth).to(GPU)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_vit().to(GPU), tmp_path).eval()
    loaded.load_adapter(tmp_path, adapter_name="again")
    loaded.add_adapter("other", E2VPTConfig(num_visual_prompts=2))
    assert devices(loaded) == {GPU}
    expected = model(images().to(GPU)).logits
    mixed = loaded(images().to(GPU), adapter_names=["default", "again", "default"]).logits
    torch.testing.assert_close(mixed, expected, **CLOSE)


@depths
@torch.inference_mode()
def test_streams(depth: str) -> None:
    model = adapted(depth).to(GPU)
    expected = model(images().to(GPU)).logits
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = model(images().to(GPU)).logits
    torch.cuda.current_stream().wait_stream(stream)
    torch.testing.assert_close(found, expected, **CLOSE)


@torch.inference_mode()
def test_a_stream_does_not_read_what_another_one_has_yet_to_write() -> None:
    model = adapted("deep").to(GPU)
    pixels = images().to(GPU)
    expected = model(pixels).logits
    model.eval()  # nothing is kept any more
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(10**9)  # about half a second
        model(pixels)
    with torch.cuda.stream(torch.cuda.Stream()):
        found = model(pixels).logits
    torch.cuda.synchronize()
    torch.testing.assert_close(found, expected, **CLOSE)
