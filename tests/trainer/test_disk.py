"""A disk that is full and a folder that is read-only give an error and lose nothing."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from e2vpt_peft.utils.files import SAVING, whole_files, write_atomically

from ..support.models import tiny_vit
from .test_trainer import Trainings, same, snapshot
from .toy import make_trainer, pruning

SMALL = pruning(token_rates=[0.5], segment_rates=[0.5])


@contextmanager
def full_disk(size):
    """No file of this process can become larger, which fails in the middle of a write as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def read_only():
    """A folder, and a process that may not write into it."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o555)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    yield folder
    if is_root:
        os.seteuid(0)
    folder.chmod(0o755)
    shutil.rmtree(folder)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("size", [0, 1, 500])
def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, size):
    write_atomically(tmp_path / "file", b"old")
    with full_disk(size), pytest.raises(OSError):
        write_atomically(tmp_path / "file", b"new" * 1000)
    assert contents(tmp_path) == {Path("file"): b"old"}


def test_files_appear_together_and_see_the_known_ones(tmp_path):
    (tmp_path / "README.md").write_text("old")
    with whole_files(tmp_path, ["README.md", "absent"]) as folder:
        assert contents(folder) == {Path("README.md"): b"old"}
        (folder / "README.md").write_text("new")
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("new")
        assert contents(tmp_path)[Path("README.md")] == b"old"
    assert contents(tmp_path) == {Path("README.md"): b"new", Path("sub/file"): b"new"}


def test_what_a_killed_process_has_left_is_removed(tmp_path):
    (tmp_path / SAVING / "sub").mkdir(parents=True)
    (tmp_path / SAVING / "half").write_text("ha")
    with whole_files(tmp_path) as folder:
        (folder / "file").touch()
    assert contents(tmp_path) == {Path("file"): b""}


@pytest.mark.parametrize("size", [0, 300, 1500, 5000])
def test_saving_on_a_full_disk_leaves_the_adapter_saved_before(tmp_path, size):
    trainer = make_trainer(tmp_path / "out")
    trainer.save_model(str(tmp_path / "saved"))
    before = contents(tmp_path / "saved")
    assert len(before) == 4 and max(map(len, before.values())) > 5000
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(1)
    with full_disk(size), pytest.raises(Exception, match="File too large|I/O error|os error 27|write|iostream"):
        trainer.save_model(str(tmp_path / "saved"))
    assert contents(tmp_path / "saved") == before
    PeftModel.from_pretrained(tiny_vit(num_hidden_layers=2), tmp_path / "saved")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    trainer = make_trainer(folder, config=SMALL, save_strategy="epoch")
    trainer.train()
    return trainer, folder


@pytest.mark.parametrize("size", [10, 1000, 3000, 9000, 20000])
def test_a_search_whose_disk_is_full_goes_on_when_there_is_room(tmp_path, size, undisturbed):
    with full_disk(size), pytest.raises((OSError, RuntimeError)):
        make_trainer(tmp_path, config=SMALL, save_strategy="epoch").train()
    assert not list(tmp_path.rglob("*.tmp"))
    trainer = make_trainer(tmp_path, config=SMALL, save_strategy="epoch")
    trainer.train(resume_from_checkpoint=True)
    expected, folder = undisturbed
    results = "pruning_results.json"
    assert (tmp_path / results).read_text() == (folder / results).read_text()
    same(snapshot(trainer), snapshot(expected), 1e-6)


def test_a_search_in_a_read_only_folder_is_refused_before_anything_is_trained(read_only):
    trainings = Trainings()
    trainer = make_trainer(read_only, callbacks=[trainings])
    before = snapshot(trainer)
    with pytest.raises(PermissionError):
        trainer.train()
    assert trainings.folders == []
    same(snapshot(trainer), before)
    with pytest.raises(PermissionError):
        trainer.save_model(str(read_only))
    assert contents(read_only) == {}
