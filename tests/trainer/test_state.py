from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from e2vpt_peft.trainer.checkpoints import Progress, seal
from e2vpt_peft.trainer.state import FOLDER, RECORDS, SearchState

SETTINGS = {"seed": 1, "token_rates": [0.5]}


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"prompts": torch.full((2,), value)}


def checkpoint(state: SearchState, phase: str, step: int, **progress: Any) -> Path:
    """A sealed checkpoint."""
    folder = state.phase_folder(phase) / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "optimizer.pt").write_bytes(bytes(100))
    seal(folder, Progress(**{"is_exact": True, "loss": 0.5, "callbacks": [], **progress}))
    return folder


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


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
    whole, half = checkpoint(state, "tune", 10), checkpoint(state, "tune", 11)
    (half / "seal.json").unlink()
    assert state.last_checkpoint("tune") == (str(whole), Progress(True, 0.5, []))
    assert not half.exists()


@pytest.mark.parametrize("file", ["optimizer.pt", "seal.json"])
def test_a_damaged_checkpoint_is_passed_over_by_name(tmp_path: Path, file: str, caplog: Any) -> None:
    state = SearchState(str(tmp_path), SETTINGS, resume=False)
    whole, damaged = checkpoint(state, "tune", 1), checkpoint(state, "tune", 2)
    damage(damaged / file)
    found = state.last_checkpoint("tune")
    assert found is not None and found[0] == str(whole)
    assert f"{damaged / file} is missing or damaged" in caplog.text


def test_a_phase_goes_on_only_where_that_is_exact_and_its_best_checkpoint_is_whole(tmp_path: Path) -> None:
    state = SearchState(str(tmp_path), SETTINGS, resume=False)
    first = checkpoint(state, "tune", 1)
    best = checkpoint(state, "tune", 2, best="checkpoint-1")
    checkpoint(state, "tune", 3, best="checkpoint-2")
    checkpoint(state, "tune", 4, is_exact=False)
    damage(best / "optimizer.pt")
    found = state.last_checkpoint("tune")
    assert found is not None and found[0] == str(first)


def test_what_is_damaged_of_a_phase_is_done_again(tmp_path: Path, caplog: Any) -> None:
    state = SearchState(str(tmp_path), SETTINGS, resume=False)
    for phase in ("initial", "start", "tune", "scores", "candidate-1"):
        state.finish(phase, {}, tensors(1.0))
    damage(state.folder / "tune.safetensors")
    (state.folder / "scores.safetensors").unlink()
    again = SearchState(str(tmp_path), SETTINGS, resume=True)
    assert list(again.records) == ["initial", "start", "candidate-1"]
    for name in ("tune", "scores"):
        assert f"{state.folder / name}.safetensors is missing or damaged" in caplog.text


def test_a_damaged_start_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    state = SearchState(str(tmp_path), SETTINGS, resume=False)
    state.finish("start", {}, tensors(1.0))
    damage(state.folder / "start.safetensors")
    with pytest.raises(ValueError, match="start.safetensors is missing or damaged"):
        SearchState(str(tmp_path), SETTINGS, resume=True)
    with pytest.raises(ValueError, match="start.safetensors is missing or damaged"):
        state.tensors("start")


def test_every_bit_that_flips_in_the_records_is_noticed(tmp_path: Path) -> None:
    state = SearchState(str(tmp_path), SETTINGS, resume=False)
    state.finish("tune", {"metric": 0.5}, tensors(1.0))
    path = state.folder / RECORDS
    content = path.read_bytes()
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        if flipped.split() == content.split():  # white space, which says nothing
            continue
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"state.json is damaged|other settings") as raised:
            SearchState(str(tmp_path), SETTINGS, resume=True)
        assert str(state.folder) in str(raised.value)
    path.write_bytes(content[:-9])
    with pytest.raises(ValueError, match="state.json is damaged.*start anew"):
        SearchState(str(tmp_path), SETTINGS, resume=True)


def test_a_search_of_other_settings_is_not_resumed_and_stays_as_it_is(tmp_path: Path) -> None:
    SearchState(str(tmp_path), SETTINGS, resume=False).finish("tune", {}, tensors(1.0))
    before = (tmp_path / FOLDER / RECORDS).read_bytes()
    with pytest.raises(
        ValueError, match=r"The search in .* other settings: seed=2 \(it was 1\), more.a=1 \(it was None\)\. Resume it"
    ):
        SearchState(str(tmp_path), {**SETTINGS, "seed": 2, "more": {"a": 1}}, resume=True)
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
