"""`accelerate launch` with the config files of examples/accelerate, on two processes of a CPU."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file

from ..support.models import images, tiny_vit
from ..trainer.distributed import search
from ..trainer.interrupted import Events
from .lora import fault_of_resuming
from .on_cpu import CONFIGS, DEEPSPEED, NEEDS_DEEPSPEED, launch
from .train import train

needs_deepspeed = pytest.mark.skipif(not DEEPSPEED.exists(), reason=NEEDS_DEEPSPEED)
ENGINES = [
    ("cpu", "DistributedDataParallel"),
    ("fsdp2", "fsdp2"),
    pytest.param("deepspeed_zero2", "deepspeed_zero2", marks=needs_deepspeed),
    pytest.param("deepspeed_zero3", "deepspeed_zero3", marks=needs_deepspeed),
]


def losses(folder):
    return torch.tensor(json.loads((folder / "losses.json").read_text()))


def assert_same_adapter(first, second):
    files = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (first, second)]
    assert files[0].keys() == files[1].keys()
    for name in files[0]:
        torch.testing.assert_close(files[0][name], files[1][name], rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """What tests.distributed.engines does, on one process and without engines."""
    folder = tmp_path_factory.mktemp("one_process")
    train(str(folder / "whole"), processes=1)
    train(str(folder / "accumulated"), processes=1, gradient_accumulation_steps=2)
    train(str(folder / "bfloat16"), processes=1, gradient_accumulation_steps=2, bf16=True)
    search(str(folder / "search"), 0, 1, Events(float("inf"), lambda: None)).train()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("config", "engine"), ENGINES)
def test_two_processes_do_what_one_process_does(config, engine, one_process, tmp_path):
    cannot_resume = fault_of_resuming(config)
    process = launch(config, "tests.distributed.engines", str(tmp_path), "no" if cannot_resume else "epoch")
    assert process.returncode == 0, process.stderr

    for run in ("whole", "accumulated", *([] if cannot_resume else ["resumed"])):
        assert (tmp_path / run / "engine").read_text() == engine
        expected = one_process / ("accumulated" if run == "accumulated" else "whole")
        torch.testing.assert_close(losses(tmp_path / run), losses(expected), rtol=0, atol=1e-5)
        assert_same_adapter(tmp_path / run, expected)
    loaded = PeftModel.from_pretrained(tiny_vit(num_hidden_layers=2), tmp_path / "whole" / "adapter")
    reference = PeftModel.from_pretrained(tiny_vit(num_hidden_layers=2), one_process / "whole" / "adapter")
    torch.testing.assert_close(loaded(images()).logits, reference(images()).logits, rtol=1e-5, atol=1e-5)
    # Sums of bfloat16 come out a little differently in batches of another size.
    in_bfloat16 = losses(tmp_path / "bfloat16")
    torch.testing.assert_close(in_bfloat16, losses(one_process / "bfloat16"), rtol=2e-2, atol=2e-2)
    refused = "The model is in shards" in (tmp_path / "scored_in_shards").read_text()
    assert refused == (engine in ("fsdp2", "deepspeed_zero3"))  # ZeRO 2 has the parameters whole

    # E2VPTTrainer, interrupted on both processes and resumed
    assert len(list(tmp_path.glob("interrupted*"))) == 2
    pruned, expected = tmp_path / "search", one_process / "search"
    assert (pruned / "engines").read_text() == engine
    for phase in ("tune", "scores", "candidate-1", "candidate-2"):
        file = f"_pruning_state/{phase}.safetensors"
        torch.testing.assert_close(load_file(pruned / file), load_file(expected / file), rtol=0, atol=1e-5)
    results, reference = (json.loads((folder / "pruning_results.json").read_text()) for folder in (pruned, expected))
    assert results["best"] == reference["best"] != "unpruned"
    ranks = [load_file(pruned / f"rank{rank}.safetensors") for rank in (0, 1)]
    torch.testing.assert_close(*ranks, rtol=0, atol=0)
    loaded = PeftModel.from_pretrained(tiny_vit(num_hidden_layers=2), pruned / "result").eval()
    for name, parameter in loaded.named_parameters():
        if name in ranks[0]:
            torch.testing.assert_close(parameter, ranks[0][name], rtol=0, atol=0, check_stride=False)
    assert loaded.peft_config["default"].token_mask == ranks[0]["token_mask"].tolist()
    best = next(row for row in results["candidates"] if row["name"] == results["best"])
    assert float((pruned / "loss").read_text()) == pytest.approx(best["metric"], abs=1e-5)

    if cannot_resume:
        pytest.skip(f"all but going on from a checkpoint is right: {cannot_resume}")
    # Two processes went as far as step 3, one goes on from there. DeepSpeed does that with the same number only.
    alone = tmp_path / "alone"
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", alone / "checkpoint-3")
    if engine == "fsdp2":
        process = launch(config, "tests.distributed.train", str(alone), processes=1)
        assert process.returncode == 0, process.stderr
        assert (alone / "engine").read_text() == engine
    elif engine == "DistributedDataParallel":
        train(str(alone), processes=1, resume=True)
    else:
        return
    torch.testing.assert_close(losses(alone), losses(one_process / "whole"), rtol=0, atol=1e-5)
    assert_same_adapter(alone, one_process / "whole")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_config_files_are_what_accelerate_understands(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    given = yaml.safe_load(path.read_text())
    assert config.distributed_type.value == given["distributed_type"]
    assert config.num_processes == 2
