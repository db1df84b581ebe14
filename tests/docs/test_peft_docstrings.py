"""Docstrings of the reference: no types in words, references that are links, one entry for each name."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest

from .pages import ROOT

pytest.importorskip("griffe")

EXPORTED = {"score_prompts": "e2vpt_peft.score_prompts"}


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("peft_docstrings", ROOT / "docs" / "peft_docstrings.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_types_and_defaults_are_left_to_the_signature() -> None:
    text = "Do it.\n\nArgs:\n    rate (`float`, *optional*, defaults to `0.5`): How much,\n        at most.\n"
    assert "    rate: How much,\n        at most." in load().in_google_style(text, {})


def test_names_on_one_line_become_entries_of_their_own() -> None:
    text = (
        "Args:\n    token_rate, segment_rate (`float`): The share,\n        rounded down.\n    other (`int`): More.\n"
    )
    expected = "token_rate: The share,\n        rounded down.\n    segment_rate: See `token_rate`.\n    other: More."
    assert expected in load().in_google_style(text, {})


@pytest.mark.parametrize(
    "reference, shown",
    [
        ("[`score_prompts`]", "[`score_prompts`][e2vpt_peft.score_prompts]"),
        ("[`~transformers.Trainer.train`]", "`Trainer.train`"),
        ("[`~accelerate.Accelerator`]", "`Accelerator`"),
    ],
)
def test_references_are_links_where_the_reference_has_the_name(reference: str, shown: str) -> None:
    assert load().in_google_style(f"See {reference}.", EXPORTED) == f"See {shown}."


def test_examples_are_read_without_fences() -> None:
    text = "Example:\n\n    ```py\n    >>> run()\n    ```\n"
    assert load().in_google_style(text, {}) == "Examples:\n\n    >>> run()"
