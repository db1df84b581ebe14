from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from e2vpt_peft.trainer import last_whole_checkpoint
from e2vpt_peft.trainer.checkpoints import Progress, checkpoints_in, seal, sealed_progress

from .interrupted import Interruption
from .toy import make_trainer

PROGRESS = Progress(is_exact=True, loss=1.5, callbacks=[{"counter": 2}], best="checkpoint-4")


def checkpoint(folder: Path, step: int) -> Path:
    """The files of a checkpoint of Trainer."""
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    save_file({"prompts": torch.ones(50)}, path / "adapter_model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        torch.save({"state": torch.ones(50)}, path / name)
    (path / "adapter_config.json").write_text('{"peft_type": "E2VPT"}')
    (path / "trainer_state.json").write_text('{"global_step": 4}')
    return path


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(b"\x80?") + 1] ^= 1  # in one of the ones
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("file", "harm"),
    [
        ("trainer_state.json", Path.unlink),
        ("trainer_state.json", cut),
        ("adapter_config.json", cut),
        ("adapter_model.safetensors", cut),
        ("optimizer.pt", cut),
        ("rng_state.pth", cut),
        ("training_args.bin", lambda path: path.write_bytes(b"")),
        ("optimizer.pt", flip),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_passed_over_and_left(
    tmp_path: Path, file: str, harm: Any, caplog: Any
) -> None:
    whole, last = checkpoint(tmp_path, 9), checkpoint(tmp_path, 10)
    assert last_whole_checkpoint(tmp_path) == str(last)
    harm(last / file)
    assert last_whole_checkpoint(tmp_path) == str(whole)
    assert f"{last / file} is missing or damaged" in caplog.text
    assert last.exists()


def test_where_no_checkpoint_is_there_is_none(tmp_path: Path) -> None:
    assert last_whole_checkpoint(tmp_path / "nowhere") is None
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-3").mkdir()
    assert last_whole_checkpoint(tmp_path) is None
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-3"]


def test_a_seal_has_the_progress_and_notices_every_change(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 4)
    assert sealed_progress(path) is None
    seal(path, PROGRESS)
    assert sealed_progress(path) == PROGRESS
    for file in sorted(path.iterdir()):
        content = file.read_bytes()
        for place in {0, len(content) // 3, len(content) - 2}:
            changed = bytearray(content)
            changed[place] ^= 16
            file.write_bytes(changed)
            assert sealed_progress(path) is None, (file, place)
            assert last_whole_checkpoint(tmp_path) is None
        file.write_bytes(content)
    assert sealed_progress(path) == PROGRESS
    (path / "scheduler.pt").unlink()
    assert sealed_progress(path) is None


def test_a_search_goes_on_from_the_checkpoint_before_a_damaged_one(tmp_path: Path, caplog: Any) -> None:
    from .test_trainer import Trainings, same, snapshot

    class Stop(Trainings):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 7:
                raise Interruption

    steps = []

    class Steps(Trainings):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            steps.append(state.global_step)

    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
    with pytest.raises(Interruption):
        make_trainer(tmp_path / "killed", callbacks=[Stop()], **options).train()
    cut(tmp_path / "killed/_pruning_state/tune/checkpoint-6/adapter_model.safetensors")
    resumed = make_trainer(tmp_path / "killed", callbacks=[Steps()], **options)
    resumed.train(resume_from_checkpoint=True)
    assert steps[0] == 4
    assert "checkpoint-6/adapter_model.safetensors is missing or damaged" in caplog.text
    undisturbed = make_trainer(tmp_path / "undisturbed", **options)
    undisturbed.train()
    same(snapshot(resumed), snapshot(undisturbed))
