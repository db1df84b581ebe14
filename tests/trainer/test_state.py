from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch

from e2vpt_peft.trainer.processes import on_main_process
from e2vpt_peft.trainer.state import FOLDER, RECORDS, SearchState

SETTINGS = {"seed": 1, "token_rates": [0.5]}


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"prompts": torch.full((2,), value)}


def checkpoint(state: SearchState, phase: str, step: int, whole: bool = True) -> Path:
    """A checkpoint with the files that Trainer writes; one that is not whole has half a random state."""
    folder = state.phase_folder(phase) / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text("{}")
    for name in ("scheduler.pt", "optimizer.pt", "rng_state.pth"):
        with zipfile.ZipFile(folder / name, "w") as file:
            file.writestr("data", "0" * 100)
    if not whole:
        path = folder / "rng_state.pth"
        path.write_bytes(path.read_bytes()[:50])
    return folder


def test_what_is_finished_is_there_when_the_search_is_resumed(tmp_path: Path) -> None:
    assert not SearchState.exists(str(tmp_path))
    state = SearchState(str(tmp_path), SETTINGS, resume=False)
    state.finish("tune", {"metric": 0.5}, tensors(3.0))
    assert SearchState.exists(str(tmp_path))
    again = SearchState(str(tmp_path), SETTINGS, resume=True)
    assert again.records == {"tune": {"metric": 0.5}}
    assert torch.equal(again.tensors("tune")["prompts"], torch.tensor([3.0, 3.0]))


def test_checkpoints_of_a_finished_phase_are_removed_and_those_of_others_stay(tmp_path: Path) -> None:
    state = SearchState(str(tmp_path), SETTINGS, resume=False)
    finished, other = checkpoint(state, "tune", 4), checkpoint(state, "candidate-1", 4)
    state.finish("tune", {}, tensors(1.0))
    assert not finished.exists() and other.exists()


def test_the_last_checkpoint_is_the_last_whole_one_by_its_number(tmp_path: Path) -> None:
    state = SearchState(str(tmp_path), SETTINGS, resume=False)
    assert state.last_checkpoint("tune") is None
    checkpoint(state, "tune", 9)
    whole, half = checkpoint(state, "tune", 10), checkpoint(state, "tune", 11, whole=False)
    assert state.last_checkpoint("tune") == str(whole)
    assert not half.exists()


def test_a_search_of_other_settings_is_not_resumed_and_stays_as_it_is(tmp_path: Path) -> None:
    SearchState(str(tmp_path), SETTINGS, resume=False).finish("tune", {}, tensors(1.0))
    before = (tmp_path / FOLDER / RECORDS).read_bytes()
    with pytest.raises(ValueError, match=r"seed=2, but the search in .* was started with 1: resume it with that"):
        SearchState(str(tmp_path), {**SETTINGS, "seed": 2}, resume=True)
    assert (tmp_path / FOLDER / RECORDS).read_bytes() == before


def test_a_new_search_keeps_the_one_before_once(tmp_path: Path) -> None:
    for phase in ("first", "second", "third"):
        SearchState(str(tmp_path), SETTINGS, resume=False).finish(phase, {}, tensors(1.0))
    kept = json.loads((tmp_path / f"{FOLDER}.bak" / RECORDS).read_text())
    assert list(kept["records"]) == ["second"]
    assert list(SearchState(str(tmp_path), SETTINGS, resume=True).records) == ["third"]


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "thesis.tex").write_text("important")
    with pytest.raises(FileExistsError, match="holds something else: choose another output_dir"):
        SearchState(str(tmp_path), SETTINGS, resume=False)
    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == ["thesis.tex"]


def test_on_one_process_what_is_made_and_what_is_raised_comes_back() -> None:
    assert on_main_process(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        on_main_process(lambda: 1 / 0)
