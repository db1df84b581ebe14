"""A search on several processes: `torchrun --nproc_per_node 2 -m tests.trainer.distributed FOLDER`.

The first time, one search runs to its end and another one is killed. The second time, that one is resumed.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from .interrupted import Events
from .toy import adapted, make_trainer, pruning, taken


def search(folder: str, seed: int, processes: int, events: Events, **options: Any) -> Any:
    """A trainer whose batches are the same, over all processes, for any number of them."""
    keywords: dict[str, Any] = {"save_strategy": "epoch", "use_cpu": True, **options}
    return make_trainer(
        folder,
        model=adapted(seed=seed, prompt_dropout=0.0),  # dropout would differ
        config=pruning(token_rates=[0.5], segment_rates=[0.0, 0.5], tolerance=1.0),  # a pruned one wins
        callbacks=[events],
        ddp_backend="gloo" if processes > 1 and keywords["use_cpu"] else None,
        per_device_train_batch_size=8 // processes,
        per_device_eval_batch_size=8 // processes,
        **keywords,
    )


def run(folder: Path, seed: int, last: float) -> None:
    """Start or resume a search, whose processes are killed at an event."""
    trainer = search(str(folder), seed, 2, Events(last, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    assert trainer.args.world_size == 2
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model(str(folder / "result"))
    save_file(taken(trainer.model), folder / f"rank{os.environ['RANK']}.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    if (target / "killed").exists():
        run(target / "killed", 7, float("inf"))
    else:
        run(target / "two", 0, float("inf"))
        run(target / "killed", 0, 18)  # in the second epoch of the first candidate
