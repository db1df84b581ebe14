from __future__ import annotations

import re

import e2vpt_peft
import e2vpt_peft.plots

from .pages import PAGES


def test_the_reference_has_the_whole_public_api() -> None:
    described = set(re.findall(r"^::: e2vpt_peft\.(\w+)$", PAGES["docs/reference.md"].read_text(), re.MULTILINE))
    assert described == set(e2vpt_peft.__all__) - {"__version__", "E2VPTType"}


def test_the_reference_has_all_pictures() -> None:

    described = re.findall(r"^::: e2vpt_peft\.plots\.(\w+)$", PAGES["docs/reference.md"].read_text(), re.MULTILINE)
    assert set(described) == set(e2vpt_peft.plots.__all__)
