"""Rows as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from .rows import Row


def header(run: dict[str, str]) -> str:
    """The lines above the tables."""
    versions = ", ".join(f"{name} {run[name]}" for name in ("torch", "transformers", "peft"))
    return f"Weights in {run['weights']}. {run['hardware']}. {versions}.\n\n    {run['command']}\n"


def tables(rows: Sequence[Row], level: int = 3) -> str:
    """A table for each measure and model: a line for each subject, a column for each baseline, mode and batch size."""
    kinds = dict.fromkeys((row.measure, row.model) for row in rows)
    return "\n\n".join(
        f"{'#' * level} {measure[:1].upper()}{measure[1:]}, {model}\n\n"
        + table([row for row in rows if (row.measure, row.model) == (measure, model)])
        for measure, model in kinds
    )


def table(rows: Sequence[Row]) -> str:
    """The rows of one measure and one model."""
    baselines, modes = (list(dict.fromkeys(names)) for names in zip(*((row.baseline, row.mode) for row in rows)))
    columns = sorted(
        {(row.baseline, row.mode, row.batch_size) for row in rows},
        key=lambda column: (baselines.index(column[0]), modes.index(column[1]), column[2]),
    )
    subjects = list(dict.fromkeys(row.subject for row in rows))
    cells = {(row.subject, row.baseline, row.mode, row.batch_size): row for row in rows}
    several = len(modes) > 1
    titles = ["", *(_title(baseline, mode if several else "", size) for baseline, mode, size in columns)]
    lines = [titles, ["---"] * len(titles)]
    for subject in subjects:
        found = [cells.get((subject, *column)) for column in columns]
        lines.append([subject, *("" if row is None else shown(row) for row in found)])
    return markdown(lines)


def _title(baseline: str, mode: str, batch_size: int) -> str:
    against = f"against {baseline}" if baseline else ""
    return ", ".join(part for part in (against, mode, f"batch {batch_size}") if part)


def shown(row: Row) -> str:
    """A value and, in brackets, its quartiles."""
    if row.rounds == 1:
        return number(row.value)
    return f"{number(row.value)} ({number(row.low)}–{number(row.high)})"


def number(value: float) -> str:
    """Three digits behind the point for ratios, none for large numbers."""
    if value < 10:
        return f"{value:.3f}"
    return f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:.1f}"


def markdown(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
