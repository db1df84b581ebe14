"""All that is done on several processes, in one launch, as that takes long.

`-m tests.distributed.engines FOLDER CHECKPOINTS`, where CHECKPOINTS is the save_strategy of the search. With "no", for
an accelerate that cannot load checkpoints, the search starts the training anew in which it was interrupted.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from e2vpt_peft import score_prompts

from ..trainer.distributed import search
from ..trainer.interrupted import Events, Interruption
from ..trainer.toy import TRAIN, taken
from .on_cpu import allow_shards_on_cpu, engine
from .train import train


class Engines(Events):
    """Also notes by what the model of each phase is trained."""

    seen: set[str] = set()

    def on_step_end(self, *arguments: Any, **options: Any) -> None:
        self.seen.add(engine(trainer.model_wrapped))
        super().on_step_end(*arguments, **options)


def interrupt() -> None:
    raise Interruption


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, checkpoints, processes = Path(sys.argv[1]), sys.argv[2], int(os.environ["WORLD_SIZE"])
    sharded = allow_shards_on_cpu()

    trainer: Any = train(str(folder / "whole"), processes, use_cpu=not sharded)
    try:
        score_prompts(trainer.model, DataLoader(TRAIN, 8), progress_bar=False)  # type: ignore[arg-type]
        outcome = "scored"
    except ValueError as error:
        outcome = str(error)
    if PartialState().is_main_process:
        (folder / "scored_in_shards").write_text(outcome)
        shutil.copytree(folder / "whole" / "checkpoint-3", folder / "resumed" / "checkpoint-3")
    PartialState().wait_for_everyone()
    if checkpoints != "no":
        train(str(folder / "resumed"), processes, resume=True, use_cpu=not sharded)
    train(str(folder / "accumulated"), processes, gradient_accumulation_steps=2, use_cpu=not sharded)

    # Both processes are interrupted in the second epoch of the first candidate, and go on with other initial values.
    for seed, last in ((0, 18), (7, float("inf"))):
        events = Engines(last, interrupt)
        options = {"use_cpu": not sharded, "save_strategy": checkpoints}
        trainer = search(str(folder / "search"), seed, processes, events, **options)
        try:
            trainer.train(resume_from_checkpoint=True)
        except Interruption:
            (folder / f"interrupted{PartialState().process_index}").touch()
    metrics = trainer.evaluate()
    trainer.save_model(str(folder / "search" / "result"))
    snapshot = taken(trainer.model)
    save_file(snapshot, folder / "search" / f"rank{PartialState().process_index}.safetensors")
    if PartialState().is_main_process:
        (folder / "search" / "engines").write_text(" ".join(sorted(Engines.seen)))
        (folder / "search" / "loss").write_text(str(metrics["eval_loss"]))

    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    train(str(folder / "bfloat16"), processes, gradient_accumulation_steps=2, bf16=True, use_cpu=not sharded)
