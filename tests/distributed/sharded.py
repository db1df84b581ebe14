"""Training in shards, as FSDP2 does it: `torchrun --nproc_per_node 2 -m tests.distributed.sharded FOLDER DEPTH`.

accelerate has FSDP on GPUs only. What it calls there, PyTorch's `fully_shard`, runs on CPUs, too.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from peft import PeftModel
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers.models.vit.modeling_vit import ViTLayer

from ..trainer.toy import TRAIN, adapted


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


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, depth = sys.argv[1:]
    dist.init_process_group("gloo")
    model = make_model(depth)
    for module in list(model.modules()):
        if isinstance(module, ViTLayer):
            fully_shard(module)
    fully_shard(model)
    assert isinstance(model, FSDPModule)
    losses = steps(model, dist.get_rank(), dist.get_world_size())
    state_dict = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        model.save_pretrained(folder, state_dict=state_dict)
        Path(folder, "losses.json").write_text(json.dumps(losses))
    dist.destroy_process_group()
