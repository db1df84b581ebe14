"""Every Python block of the pages runs as written, and every command names what exists."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from .pages import PAGES, ROOT, blocks, commands

TESTED_ELSEWHERE = {"docs/hub.md": "tests/hub/test_guide.py"}  # needs a Hub
SLOW = {"docs/inference.md", "docs/pictures.md", "docs/pruning.md"}
OTHER_PROGRAMS = {
    "accelerate",
    "git",
    "hf",
    "mkdocs",
    "mypy",
    "pre-commit",
    "pytest",
    "ray",
    "ruff",
    "torchrun",
    "twine",
}

WITH_PYTHON = [page for page in PAGES if blocks(page, "python") and page not in TESTED_ELSEWHERE]
LANGUAGES = ("python", "bash", "sh")
WITH_CODE = [page for page in PAGES if page.startswith("docs/") and blocks(page, *LANGUAGES)]
WITH_COMMANDS = [page for page in PAGES if commands(page)]


def make_digits_output(folder: Path) -> None:
    """What the command that the page starts with leaves, after a training of one step."""
    recipe = "examples/recipes/digits.yaml"
    run_script("examples/image_classification.py", recipe, "--max_steps=1", "--max_train_samples=50", "--use_cpu")
    assert (folder / "digits-output" / "adapter_model.safetensors").exists()


def check_pruning(folder: Path, names: dict[str, Any]) -> None:
    results = json.loads((folder / "digits" / "pruning_results.json").read_text())
    assert names["output"].metrics["pruning_candidates"] == results["candidates"]
    for file in ("digits.png", "pruned/adapter_model.safetensors", "digits/adapter_model.safetensors"):
        assert (folder / file).exists()


BEFORE = {"docs/inference.md": make_digits_output}
AFTER = {"docs/pruning.md": check_pruning}


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.slow if page in SLOW else ()) for page in WITH_PYTHON]
)
def test_python_runs_as_written(page: str, checkout: Path) -> None:
    """The blocks of a page share their names, and have no others."""
    names: dict[str, Any] = {"__name__": "page"}
    if page in BEFORE:
        BEFORE[page](checkout)
    for number, block in enumerate(blocks(page, "python"), start=1):
        exec(compile(block, f"{page}, block {number}", "exec"), names)
    if page in AFTER:
        AFTER[page](checkout, names)


@pytest.mark.parametrize("page", WITH_CODE)
def test_code_fits_the_column(page: str) -> None:
    lines = [line for code in blocks(page, *LANGUAGES) for line in code.splitlines()]
    assert not [line for line in lines if len(line) > 80]


@pytest.mark.filterwarnings("ignore:.* found in sys.modules:RuntimeWarning")  # a module that its tests imported
@pytest.mark.parametrize("page", WITH_COMMANDS)
def test_commands_name_what_exists(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for command in commands(page):
        check_command(command)


def check_command(command: str) -> None:
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"[A-Z0-9_]+=.*", words[0]):
        words = words[1:]
    program, *rest = words
    program = program.removeprefix(".venv/bin/")
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(rest) <= set(targets), f"{command}: the Makefile has no such target"
    elif program == "pip":
        check_pip(command, rest)
    elif program in ("python", "python3"):
        check_script(command, rest)
    elif program in ("accelerate", "torchrun"):
        scripts = [index for index, word in enumerate(rest) if word.endswith(".py")]
        assert scripts, f"{command}: starts no script"
        if rest[scripts[0]].startswith("examples/"):
            check_script(command, rest[scripts[0] :])
    else:
        assert program in OTHER_PROGRAMS, f"{command}: what is {program}?"


def check_pip(command: str, words: list[str]) -> None:
    assert words[0] == "install", command
    assert not any(word.startswith("e2vpt") for word in words), f"{command}: the package is on no index yet"
    extras = re.search(
        r"\[project.optional-dependencies\]\n(.*?)\n\[", (ROOT / "pyproject.toml").read_text(), re.DOTALL
    )
    assert extras is not None
    known = re.findall(r"^(\w+) = ", extras[1], re.MULTILINE)
    for named in re.findall(r"\[([\w,]+)\]", " ".join(words)):
        assert set(named.split(",")) <= set(known), f"{command}: no such extra"


def check_script(command: str, words: list[str]) -> None:
    if words[0] == "-m":
        words = words[1:]
        assert importlib.util.find_spec(words[0]) or words[0] in ("build", "twine"), f"{command}: no such module"
        if not words[0].startswith("examples."):
            return
    else:
        assert (ROOT / words[0]).exists(), f"{command}: no such file"
        assert not words[0].startswith("examples/benchmarks/"), f"{command}: these are modules, to run with -m"
    script = words[0]
    for word in words[1:]:
        if word.startswith("examples/"):
            assert (ROOT / word).exists(), f"{command}: no such file {word}"
    options = {word.split("=")[0] for word in words if word.startswith("--")}
    if options:
        known = set(re.findall(r"--[\w-]+", help_of(script)))
        assert options <= known, f"{command}: {script} has no {options - known}"


HELP: dict[str, str] = {}


def help_of(script: str) -> str:
    if script not in HELP:
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
            run_script(script, "--help")
        HELP[script] = output.getvalue()
    return HELP[script]


def run_script(script: str, *arguments: str) -> None:
    """As `python script ...` or `python -m module ...` would, in this process, where torch is imported already."""
    before, sys.argv = sys.argv, [script, *arguments]
    try:
        if script.endswith(".py"):
            runpy.run_path(str(ROOT / script), run_name="__main__")
        else:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
    finally:
        sys.argv = before


def test_a_page_that_is_tested_elsewhere_is() -> None:
    for page, test in TESTED_ELSEWHERE.items():
        assert page not in PAGES or (ROOT / test).exists()
