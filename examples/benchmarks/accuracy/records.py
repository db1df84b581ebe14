"""Results as JSON lines: one line for each training, written when it is finished, and never made twice."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]

PLAN = ("model", "recipe", "epochs", "batch_size", "image_size", "precision")
"""What all trainings of a comparison have in common, and their settings tell."""


def read(path: Path) -> list[Record]:
    """The records in a file. A line that a killed process left unfinished is passed over."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def read_all(paths: Iterable[Path]) -> list[Record]:
    """The records of several files, as several machines wrote them; what two of them ran counts once.

    Lines of another kind, as of `growth.py`, are passed over.
    """
    found = [record for path in paths for record in read(path) if "settings" in record]
    return list({key(record["settings"]): record for record in found}.values())


def by_plan(records: Iterable[Record]) -> list[list[Record]]:
    """The records of each plan, which do not compare with those of another."""
    plans: dict[str, list[Record]] = {}
    for record in records:
        plans.setdefault(key({name: record["settings"][name] for name in PLAN}), []).append(record)
    return list(plans.values())


def select(records: Sequence[Record], wanted: dict[str, list[str]]) -> list[Record]:
    """The records whose settings have one of the wanted values each.

    Raises:
        ValueError: No record has such a setting, or such a value of it.
    """
    for name, values in wanted.items():
        known = {str(record["settings"].get(name, "")) for record in records} - {""}
        if unknown := sorted(set(values) - known):
            raise ValueError(
                f"where has {name}={','.join(unknown)}, but the results have {sorted(known) or 'no such setting'}."
            )
        records = [record for record in records if str(record["settings"].get(name, "")) in values]
    return list(records)


def together(records: Sequence[Record], names: Sequence[str]) -> list[Record]:
    """The records, not told apart by some of their settings, which have all values that occur. The first counts.

    Raises:
        ValueError: No plan has such a setting.
    """
    if unknown := sorted(set(names) - set(PLAN)):
        raise ValueError(f"together has {unknown}, but must be among {', '.join(PLAN)}.")
    values = {name: ", ".join(sorted({str(record["settings"][name]) for record in records})) for name in names}
    found: dict[str, Record] = {}
    for record in records:
        settings = {**record["settings"], **values}
        found.setdefault(key(settings), {**record, "settings": settings})
    return list(found.values())


def key(settings: dict[str, Any]) -> str:
    """By which two trainings are the same."""
    return json.dumps(settings, sort_keys=True)


class Store:
    """A file of records that grows. Several processes may write to the same one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            self._append("")  # so that the next record does not continue a line that was cut off
        self.known = {key(record["settings"]): record for record in read(path)}

    def once(self, settings: dict[str, Any], measure: Callable[[], Record]) -> Record:
        """The record of these settings: the one in the file, or a new one.

        Args:
            settings (`dict[str, Any]`): All that tells one training from another.
            measure (`Callable`): Trains, and returns what else goes into the record.
        """
        return self.find(settings) or self.add(settings, measure())

    def find(self, settings: dict[str, Any]) -> Record | None:
        return self.known.get(key(settings))

    def add(self, settings: dict[str, Any], measured: Record) -> Record:
        """Write a record."""
        record = {"settings": settings, **measured}
        self._append(json.dumps(record, ensure_ascii=False))
        return self.known.setdefault(key(settings), record)

    def _append(self, line: str) -> None:
        """Write a whole line in one go, so that those of several processes do not mix."""
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(file, f"{line}\n".encode())
            os.fsync(file)
        finally:
            os.close(file)
