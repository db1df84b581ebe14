from __future__ import annotations

from pathlib import Path

import pytest

from e2vpt_peft.utils.files import SAVING, whole_files, write_atomically

from ..support.disk import contents, full_disk


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
