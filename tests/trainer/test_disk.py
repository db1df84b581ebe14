"""A disk that is full and a folder that is read-only give an error and lose nothing."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from ..support.disk import contents, full_disk
from ..support.models import tiny_vit
from .test_trainer import Trainings, same, snapshot
from .toy import make_trainer, pruning

SMALL = pruning(token_rates=[0.5], segment_rates=[0.5])


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


@pytest.mark.parametrize("size", [0, 300, 1500, 3000])
def test_saving_on_a_full_disk_leaves_the_adapter_saved_before(tmp_path, size):
    trainer = make_trainer(tmp_path / "out")
    trainer.save_model(str(tmp_path / "saved"))
    before = contents(tmp_path / "saved")
    assert len(before) == 4 and max(map(len, before.values())) > 4500
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(1)
    with full_disk(size), pytest.raises(Exception, match="File too large|I/O error|os error 27|write|iostream|pos"):
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
