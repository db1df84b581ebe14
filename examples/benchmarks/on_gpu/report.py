"""What is in the file of results, as Markdown and as plots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..measuring.rows import Row, latest
from ..measuring.tables import header, markdown, tables
from .peak import FLOPS, MATMUL
from .plan import PEAK
from .results import Result, Results
from .speeds import IMAGES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARE = "share of the card's measured peak"


def write_report(results: Results, names: Sequence[str]) -> str:
    """Write report.md and its plots beside the results; returns the report.

    Args:
        results (`Results`): What was found.
        names (`Sequence[str]`): All cases that there are, in their order.
    """
    known = [name for name in names if name in results.by_case]
    ended = [results.by_case[name] for name in known if "torch" in results.by_case[name]]
    rows = latest([*results.rows, *shares_of_peak(results)])
    run = {**ended[-1], "command": "python -m examples.benchmarks.gpu"} if ended else None
    lines = [["case", "", "seconds", "found"], ["---"] * 4]
    lines += [cells(name, results.by_case[name]) for name in known]
    parts = [header(run) if run else "Nothing has ended yet.", f"### Cases\n\n{markdown(lines)}", tables(rows)]
    if missing := [name for name in names if name not in results.by_case]:
        parts.append("Not begun: " + "; ".join(missing) + ".")
    report = "\n\n".join(filter(None, parts)) + "\n"
    (results.path.parent / "report.md").write_text(report, encoding="utf-8")
    for measure in ("inference time", "training step time"):
        own = [row for row in rows if row.measure == measure]
        if own:
            plot(own).savefig(results.path.parent / f"{measure.replace(' ', '_')}.png", dpi=150)
    return report


def cells(name: str, result: Result) -> list[str]:
    """A line of the table of cases."""
    if result.get("facts"):
        found = ", ".join(f"{key} {shown(value)}" for key, value in result["facts"].items())
    elif result.get("rows"):
        found = f"{len(result['rows'])} numbers"
    else:
        found = ((result.get("error") or "").strip().splitlines() or [""])[-1]
    return [name, result["status"], f"{result.get('seconds', 0):.1f}", found.replace("|", "\\|")[:300]]


def shown(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def shares_of_peak(results: Results) -> list[Row]:
    """Images per second times the operations of the backbone, over the rate of a large matrix product."""
    facts = results.by_case.get(PEAK, {}).get("facts")
    if not facts:
        return []
    factor = facts[FLOPS] / 1e3 / facts[MATMUL]
    return [
        replace(row, measure=SHARE, value=row.value * factor, low=row.low * factor, high=row.high * factor)
        for row in results.rows
        if row.measure == IMAGES
    ]


def plot(rows: Sequence[Row]) -> Figure:
    """The ratios of a measure to its first baseline: a panel for each mode, a group of bars for each batch size."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.baseline == rows[0].baseline]
    modes = list(dict.fromkeys(row.mode for row in rows))
    subjects = list(dict.fromkeys(row.subject for row in rows))
    figure = Figure(figsize=(6.9, 0.9 + 2.1 * len(modes)), layout="constrained")
    for axes, mode in zip(figure.subplots(len(modes), 1, squeeze=False)[:, 0], modes):
        sizes = sorted({row.batch_size for row in rows if row.mode == mode})
        width = 0.8 / len(subjects)
        for index, subject in enumerate(subjects):
            own = {row.batch_size: row for row in rows if (row.mode, row.subject) == (mode, subject)}
            here = [size for size in sizes if size in own]
            values = [own[size].value for size in here]
            errors = [[own[s].value - own[s].low for s in here], [own[s].high - own[s].value for s in here]]
            places = [sizes.index(size) + (index + 0.5) * width - 0.4 for size in here]
            axes.bar(places, values, width, yerr=errors, color=f"C{index}", label=subject, error_kw={"linewidth": 0.8})
        axes.axhline(1, color="0.4", linewidth=0.8)
        axes.set_xticks(range(len(sizes)), [f"batch {size}" for size in sizes])
        axes.set_title(mode, fontsize=9)
        axes.set_ylabel(f"{rows[0].measure},\ntimes that of {rows[0].baseline}", fontsize=8)
        axes.set_ylim(bottom=min(0.9, min(row.low for row in rows)))
        axes.tick_params(labelsize=8)
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, fontsize=8)
    return figure
