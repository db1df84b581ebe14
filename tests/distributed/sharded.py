"""Shards by hand, with PyTorch's own FSDP2: `torchrun --nproc_per_node 2 -m tests.distributed.sharded FOLDER`.

The recipe is that of docs/trainer.md: the model stays whole, a copy of it is sharded for each training.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader
from transformers.models.vit.modeling_vit import ViTLayer

from e2vpt_peft import prune_prompts, rewind_prompts, score_prompts

from ..trainer.toy import TRAIN, adapted

DEPTHS = ("deep", "shallow")


def steps(model: PeftModel, rank: int = 0, processes: int = 1, count: int = 6) -> list[float]:
    """Train on the same batches for any number of processes. Returns the losses."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for step in range(count):
        batch = [TRAIN[(8 * step + index) % len(TRAIN)] for index in range(rank, 8, processes)]
        inputs = {name: torch.stack([sample[name] for sample in batch]) for name in batch[0]}
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach() / processes
        if processes > 1:
            dist.all_reduce(total)
        losses.append(float(total))
    return losses


def make_model(depth: str) -> PeftModel:
    return adapted(prompt_dropout=0.0, visual_prompt_depth=depth)


def prune(model: PeftModel) -> None:
    scores = score_prompts(model, DataLoader(TRAIN, 8), progress_bar=False)  # type: ignore[arg-type]
    prune_prompts(model, scores, token_rate=0.5, segment_rate=0.5)
    rewind_prompts(model)


def shard(model: PeftModel) -> PeftModel:
    sharded = copy.deepcopy(model)
    for module in list(sharded.modules()):
        if isinstance(module, ViTLayer):
            fully_shard(module)
    fully_shard(sharded)
    assert isinstance(sharded, FSDPModule)
    return sharded


def refusal(function: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    try:
        function(*arguments, **options)
    except ValueError as error:
        return str(error)
    return ""


def run(folder: Path, depth: str) -> None:
    model = make_model(depth)
    results: dict[str, Any] = {"losses": []}
    for phase in ("tuned", "pruned"):
        sharded = shard(model)
        results["losses"] += steps(sharded, dist.get_rank(), dist.get_world_size())
        trained = get_model_state_dict(
            sharded, options=StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
        )
        unexpected = model.load_state_dict(trained, strict=False).unexpected_keys
        assert not unexpected
        if phase == "tuned":
            results["refusals"] = [
                refusal(score_prompts, sharded, DataLoader(TRAIN, 8)),  # type: ignore[arg-type]
                refusal(prune_prompts, sharded, token_mask=[True, False, True, True]),
                refusal(rewind_prompts, sharded),
            ]
            results["masks"] = [sharded.peft_config["default"].token_mask]  # type: ignore[union-attr]
            prune(model)
    state_dict = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        sharded.save_pretrained(str(folder), state_dict=state_dict)
        (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for depth in DEPTHS:
        run(Path(sys.argv[1], depth), depth)
    dist.destroy_process_group()
