"""`make docs` fails on what a reader would stumble over, and passes a page without it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from .pages import ROOT

main = pytest.importorskip("mkdocs.__main__")


def build(folder: Path, page: str) -> tuple[int, str]:
    """The command of `make docs`, with the settings of the site, on a site of two pages."""
    recipe = re.search(r"^docs:.*\n\t.*\$\(BIN\)/mkdocs (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe is not None
    settings = (ROOT / "mkdocs.yml").read_text()
    settings = re.sub(r"^(nav|plugins|theme):\n(?:[ -].*\n)+", "", settings, flags=re.MULTILINE)  # what takes long
    (folder / "mkdocs.yml").write_text(settings + "plugins: []\n")
    (folder / "docs").mkdir()
    (folder / "docs" / "index.md").write_text(page)
    (folder / "docs" / "other.md").write_text("# Other\n\n## Section\n")
    result = CliRunner().invoke(main.cli, recipe[1].split(), catch_exceptions=False)
    return result.exit_code, result.output


@pytest.mark.parametrize(
    "page, passes",
    [
        ("[other](other.md#section)", True),
        ("[other](nope.md)", False),
        ("[other](other.md#nope)", False),
        ("![picture](images/nope.png)", False),
        ("[other](/other.md)", False),
    ],
)
def test_a_broken_link_fails_the_build(
    page: str, passes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, output = build(tmp_path, f"# Page\n\n{page}\n")
    assert (code == 0) is passes, output
