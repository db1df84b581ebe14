"""The pages of the documentation, and the code on them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = {
    path.relative_to(ROOT).as_posix(): path
    for path in [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
}
SHELL = ("bash", "sh", "")
"""Languages of blocks with commands; an indented block has none."""


def blocks(page: str, *languages: str) -> list[str]:
    """The code blocks of a page in one of the languages, as written; fenced ones, or indented ones without a name."""
    text = PAGES[page].read_text()
    fenced = re.findall(r"^ *```([\w+-]*)[^\n]*\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    found = [code for language, code in fenced if language in languages]
    if "" in languages:
        prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
        found += re.findall(r"(?:(?<=\n\n)|\A)((?:    [^\n]*(?:\n|\Z))+)", prose)
    return found


def commands(page: str) -> list[str]:
    """The shell commands of a page, one line each, without comments."""
    lines = "\n".join(blocks(page, *SHELL)).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
