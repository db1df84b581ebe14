"""The notebooks run from top to bottom, and are kept without outputs, which nobody would check."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOKS = sorted((EXAMPLES / "notebooks").glob("*.ipynb"))


def read(path: Path) -> Any:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code_of(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs_of(notebook: Any) -> list[Any]:
    return [output for cell in code_of(notebook) for output in cell.outputs]


def text_of(notebook: Any, stream: str) -> str:
    """What was printed to `stdout` or `stderr`."""
    return "".join(output.text for output in outputs_of(notebook) if output.get("name") == stream)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_no_outputs_are_kept(path: Path) -> None:
    assert all(not cell.outputs and cell.execution_count is None for cell in code_of(read(path)))


@pytest.mark.slow
def test_own_images_are_learned_pruned_and_drawn(tmp_path: Path) -> None:
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    (tmp_path / "examples").symlink_to(EXAMPLES)
    notebook = read(EXAMPLES / "notebooks" / "own_images.ipynb")
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = text_of(notebook, "stdout")
    assert "Kept 5 of 10 visual prompts" in printed or "Nothing was pruned" in printed
    accuracy = re.search(r"^test: ([\d.]+)$", printed, re.MULTILINE)
    assert accuracy is not None and float(accuracy[1]) > 0.6  # 0.82 here, where chance gives 0.33
    assert not re.search("LOAD REPORT|FutureWarning|it/s", text_of(notebook, "stderr"))
    assert sum("image/png" in output.get("data", {}) for output in outputs_of(notebook)) == 2
    assert (tmp_path / "shapes-adapter" / "adapter_model.safetensors").stat().st_size < 100_000
