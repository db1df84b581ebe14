"""The tests that need a GPU, and the accuracy suite."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from .cases import Facts, Machine, NotHere
from .repository import ROOT, environment


def check_tests(machine: Machine) -> Facts:
    """`pytest -m gpu`, on the files that have such tests: to collect all takes its time."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        files = [str(file) for file in sorted(ROOT.glob("tests/**/test_*.py")) if "mark.gpu" in file.read_text()]
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *files]
        command.append(f"--junitxml={report}")
        process = subprocess.run(
            command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=max(1, machine.seconds_left)
        )
        if not report.exists():
            raise RuntimeError(f"pytest ended with {process.returncode}: {process.stdout}{process.stderr}"[-3000:])
        suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    if counts["failures"] or counts["errors"]:
        raise AssertionError(process.stdout[-6000:])
    if counts["skipped"] == counts["tests"]:
        raise NotHere(f"all {counts['tests']} tests were skipped: there is no GPU")
    return counts


def run_accuracy_suite(machine: Machine) -> Facts:
    """As much of `compare` as there is time for; it goes on where it stopped.

    Raises:
        TimeoutError: It was not finished.
    """
    options = machine.options
    if options.data_dir is None or options.model is None:
        raise NotHere("--data_dir and --model were not given")
    out = options.folder.absolute() / "accuracy.jsonl"
    command = [sys.executable, "-m", "examples.benchmarks.compare", "--suite", "photos", "--recipe", "modern"]
    command += ["--data_dir", str(Path(options.data_dir).absolute()), "--model", options.model, "--out", str(out)]
    command += ["--device", options.device]
    try:
        process = subprocess.run(
            command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=max(1, machine.seconds_left),
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(
            f"{trainings(out)} trainings are in {out.name}; the same command goes on with them"
        ) from error
    if process.returncode:
        raise RuntimeError(f"compare ended with {process.returncode}: {process.stdout[-3000:]}")
    return {"trainings": trainings(out)}


def trainings(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines()) if path.exists() else 0
