from __future__ import annotations

import importlib.util
from pathlib import Path


def test_the_table_of_architectures_in_the_docs_is_that_of_the_package():
    path = Path(__file__).parents[2] / "docs" / "support_table.py"
    spec = importlib.util.spec_from_file_location("support_table", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = module.PAGE.read_text(encoding="utf-8")
    assert module.page(text) == text, "run: python docs/support_table.py"
