"""The file of results: a line when a case begins, and one when it ends."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..accuracy.records import read
from ..measuring.rows import Row, row_of

PASSED, FAILED, NOT_HERE, BEGUN, CUT_OFF = "passed", "failed", "not here", "begun", "cut off"

Result = dict[str, Any]


class Results:
    """Of all runs that wrote into a folder.

    Args:
        folder (`Path`): The folder.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "results.jsonl"
        self.by_case: dict[str, Result] = {}
        for line in read(self.path):
            self._keep(line)

    def add(self, case: str, status: str, **found: Any) -> None:
        """Write a line, and have it on disk."""
        line = {"case": case, "status": status, **found}
        line["rows"] = [asdict(row) for row in line.get("rows", [])]
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._keep(line)

    def _keep(self, line: Result) -> None:
        if not self.has_passed(line["case"]):
            self.by_case[line["case"]] = line

    def has_passed(self, case: str) -> bool:
        """Whether a case need not be run again. What failed may have been repaired, what was missing be there."""
        return case in self.by_case and self.by_case[case]["status"] == PASSED

    @property
    def begun(self) -> list[str]:
        """The cases that began and did not end."""
        return [name for name, result in self.by_case.items() if result["status"] == BEGUN]

    @property
    def rows(self) -> list[Row]:
        return [row_of(row) for result in self.by_case.values() for row in result["rows"]]
