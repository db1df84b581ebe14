"""Writes the table of supported architectures into docs/architectures.md: `python docs/support_table.py`."""

from __future__ import annotations

from pathlib import Path

from e2vpt_peft.attention.architectures import (
    ARCHITECTURES,
    MODALITIES,
    Architecture,
)

PAGE = Path(__file__).parent / "architectures.md"
START, END = "<!-- made by docs/support_table.py -->", "<!-- end -->"


def norm_of(architecture: Architecture) -> str:
    """The norm in front of the attention, in words."""
    if isinstance(architecture.norm, str):
        return (
            "none (post-norm)"
            if architecture.norm == "none"
            else f"`{architecture.norm}`"
        )
    return ", ".join(
        f"{'none' if norm == 'none' else f'`{norm}`'} (`{layer}`)"
        for layer, norm in architecture.norm.items()
    )


def shallow_of(architecture: Architecture) -> str:
    """Where shallow prompts go, in words."""
    if not architecture.takes_tokens:
        return "no"
    count = str(architecture.special_tokens)
    if architecture.more_special_tokens:
        count = (
            f"{count} + `{architecture.more_special_tokens}`"
            if architecture.special_tokens
            else f"`{architecture.more_special_tokens}`"
        )
    return "in front" if count == "0" else f"behind {count}"


def table() -> str:
    """One line for each architecture."""
    lines = [
        "| model type | attention | norm in front of it | shallow prompts |",
        "|---|---|---|---|",
    ]
    for modality in MODALITIES:
        lines.append(f"| **{modality}** | | | |")
        for name, architecture in ARCHITECTURES.items():
            if architecture.modality == modality:
                lines.append(
                    f"| {name} | `{architecture.attention}` | {norm_of(architecture)} | {shallow_of(architecture)} |"
                )
    return "\n".join(lines)


def page(text: str) -> str:
    """The text of the page with the table as it is now."""
    before, rest = text.split(START)
    return f"{before}{START}\n\n{table()}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
