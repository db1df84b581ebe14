"""Docstrings in PEFT's style, as mkdocstrings reads them best: a griffe extension, named in mkdocs.yml.

PEFT writes types and defaults in words, ``name (`int`, *optional*, defaults to `10`): ...``, and references as
``[`Name`]``. Here both come from the signature and from cross references instead, so that types are links and every
default stands there once.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

NAMED_VALUES = ("Args:", "Attributes:")
ENTRY = re.compile(
    r"^(?P<indent> *)(?P<names>[\w*]+(?:, [\w*]+)*)(?: \(.*?\))?:(?= |$)(?P<text>.*)",
    re.DOTALL,
)
RETURNED = re.compile(r"^( +)\[?`~?([\w.\[\], ]+)`\]?: ")
REFERENCE = re.compile(r"\[`~?(?P<path>[\w.]+)`\]")


class PeftDocstrings(griffe.Extension):
    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        exported = {
            name: f"{module.path}.{name}"
            for module in (pkg, pkg["plots"])
            for name in module.exports or ()
        }
        self._rewrite(pkg, exported)

    def _rewrite(self, thing: griffe.Object, exported: dict[str, str]) -> None:
        if thing.docstring is not None:
            thing.docstring.value = in_google_style(
                thing.docstring.value, exported
            )
        for member in thing.members.values():
            if not member.is_alias:
                self._rewrite(member, exported)


def in_google_style(text: str, exported: dict[str, str]) -> str:
    lines: list[str] = []
    section = ""
    others: list[str] = []
    for line in text.splitlines():
        entry = ENTRY.match(line) if section in NAMED_VALUES else None
        if others and (
            entry or not line.strip()
        ):  # those that shared a line with the entry that ends here
            lines += others
            others = []
        if re.fullmatch(r"[A-Z]\w+:", line):
            section = line
            line = line.replace("Example:", "Examples:")
        elif section == "Example:" and line.strip().startswith("```"):
            continue
        elif entry and entry["indent"] == "    ":
            first, *names = entry["names"].split(", ")
            others = [f"    {name}: See `{first}`." for name in names]
            line = f"    {first}:{entry['text']}"
        elif section == "Returns:":
            line = RETURNED.sub(r"\1\2: ", line)
        lines.append(line)
    return REFERENCE.sub(
        lambda match: _reference(match["path"], exported),
        "\n".join(lines + others),
    )


def _reference(path: str, exported: dict[str, str]) -> str:
    """A link to what this package exports, else the name as code, with its class if it is a method."""
    *before, name = path.split(".")
    if name in exported and len(before) <= 1:
        return f"[`{name}`][{exported[name]}]"
    return (
        f"`{before[-1]}.{name}`"
        if before and before[-1][0].isupper()
        else f"`{name}`"
    )
