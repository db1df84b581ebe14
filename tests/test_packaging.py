"""What a release says about itself, and what its files say about each other."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import e2vpt_peft

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no reader of TOML")

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements(file: str) -> list[Requirement]:
    lines = (ROOT / file).read_text().splitlines()
    return [
        Requirement(line.partition(" #")[0]) for line in lines if line.strip() and not line.strip().startswith("#")
    ]


def lower_bounds(dependencies: list[str]) -> dict[str, Version]:
    """The lower bound of each dependency, which every one must have."""
    bounds = {}
    for requirement in map(Requirement, dependencies):
        (bound,) = (s for s in requirement.specifier if s.operator == ">=")
        bounds[canonicalize_name(requirement.name)] = Version(bound.version)
    return bounds


def pins(file: str) -> dict[str, Version]:
    """The version of each package on this Python and platform."""
    exact = {}
    for requirement in requirements(file):
        if requirement.marker is None or requirement.marker.evaluate():
            (pin,) = requirement.specifier
            assert pin.operator == "==", requirement
            exact[canonicalize_name(requirement.name)] = Version(pin.version)
    return exact


def extras(name: str) -> list[Requirement]:
    """What an extra asks for, with what its extras ask for."""
    found = []
    for requirement in map(Requirement, PROJECT["optional-dependencies"][name]):
        if requirement.name == PROJECT["name"]:
            found += [deeper for extra in requirement.extras for deeper in extras(extra)]
        else:
            found.append(requirement)
    return found


def jobs(workflow: Path) -> dict[str, Any]:
    return yaml.safe_load(workflow.read_text())["jobs"]


def test_every_file_names_the_same_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert citation["version"] == newest[1] == e2vpt_peft.__version__


def test_the_license_and_the_authors_are_those_of_the_citation():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["license"] == PROJECT["license"]
    assert citation["authors"] == PROJECT["authors"]


def test_the_lower_bounds_are_the_versions_that_are_tested_as_lowest():
    bounds = lower_bounds(PROJECT["dependencies"])
    tested = pins("constraints-lowest.txt")
    assert {name: tested.get(name) for name in bounds} == bounds


def test_what_is_pinned_is_allowed():
    pinned = pins("constraints.txt")
    for requirement in [*map(Requirement, PROJECT["dependencies"]), *extras("dev")]:
        assert pinned[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_constraints_are_made_of_what_the_makefile_installs_aside():
    targets = re.findall(r"--target \S+ (.+?)\)", (ROOT / "Makefile").read_text())
    aside = {name for names in targets for name in names.split()}
    asked = {canonicalize_name(requirement.name) for requirement in requirements("constraints.in")}
    assert aside and aside <= asked <= pins("constraints.txt").keys()


def test_the_pythons_of_the_classifiers_are_those_that_the_workflows_run():
    classified = {entry.rpartition(" :: ")[2] for entry in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", entry)}
    tested = set()
    for job in jobs(ROOT / ".github" / "workflows" / "tests.yml").values():
        matrix = job.get("strategy", {}).get("matrix", {}).get("python", [])
        setup = [step["with"]["python-version"] for step in job["steps"] if "setup-python" in step.get("uses", "")]
        tested |= set(matrix) | {version for version in setup if "${{" not in version}
    assert tested == classified
    assert all(version in SpecifierSet(PROJECT["requires-python"]) for version in classified)
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in classified


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_name_what_there_is(workflow):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    content = jobs(workflow)
    for name, job in content.items():
        needed = job.get("needs", [])
        assert set([needed] if isinstance(needed, str) else needed) <= content.keys(), name
        assert job["timeout-minutes"] <= 90
        for command in (step["run"] for step in job["steps"] if "run" in step):
            program, *rest = command.split()
            if program == "make":
                assert set(rest) <= targets, command
            elif "/" in program:
                assert (ROOT / program).is_file(), command


def test_no_address_is_named_before_there_is_one():
    """Where a repository exists, its addresses go into `[project.urls]`, and this test away."""
    named = re.compile(r"(github\.com|github\.io|readthedocs\.io|pypi\.org/project)/[\w./-]*e2vpt[_-]peft")
    text = [path for pattern in ("*.md", "docs/*.md", "*.toml", "*.yml", "*.cff") for path in ROOT.glob(pattern)]
    assert not [path.name for path in text if named.search(path.read_text())]
    assert set(PROJECT["urls"]) == {"Paper"}
