"""Records of what was found or done are not changed afterwards."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from typing import Any

import e2vpt_peft

FILLED_IN = {"Candidate", "CardDetails", "E2VPTConfig", "PruningArguments", "PruningConfig", "PruningSearch", "_Run"}


def test_only_what_is_filled_in_can_be_changed() -> None:
    modules = [importlib.import_module(m.name) for m in pkgutil.walk_packages(e2vpt_peft.__path__, "e2vpt_peft.")]
    kinds: dict[str, Any] = {
        name: kind
        for module in modules
        for name, kind in inspect.getmembers(module, inspect.isclass)
        if dataclasses.is_dataclass(kind) and kind.__module__.startswith("e2vpt_peft.")
    }
    assert len(kinds) > 15
    assert {name for name, kind in kinds.items() if not kind.__dataclass_params__.frozen} == FILLED_IN
