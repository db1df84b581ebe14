"""A pytest plugin that stands in for torchvision, which timm imports, and which has no build for a CPU-only torch.

timm itself is in a folder of its own (see the Makefile), because `accelerate launch` imports it when it finds it,
and fails without torchvision.

For vision transformers timm needs no more of it than names to import; what they name does nothing here.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from pathlib import Path
from typing import Any


class _AnyName(type):
    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _StandIn(types.ModuleType):
    __version__ = "0.29"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _AnyName(name, (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name.partition(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


sys.path.append(str(Path(sys.prefix, "timm")))
sys.meta_path.append(_Finder())
