"""Tables and a picture of what `compare.py` measured.

python -m examples.benchmarks.report results/*.jsonl --plot results/mini.png
python -m examples.benchmarks.report results/parts.jsonl --compare components
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .accuracy.ablations import ABLATIONS, TUNED
from .accuracy.plots import plot_parameters, plot_variants
from .accuracy.records import read_all
from .accuracy.tables import MEANS, at_the_edge, differences, final, markdown, summarise, task_groups


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="JSON lines, of one or of several machines")
    parser.add_argument("--compare", choices=ABLATIONS, default="methods", help="what to show (default: methods)")
    parser.add_argument("--against", help="what the others are compared with (default: E²VPT, if it is there)")
    parser.add_argument("--mean", choices=MEANS, default=MEANS[0], help=f"of the plot (default: {MEANS[0]})")
    parser.add_argument("--plot", type=Path, help="save a picture of the accuracies there")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> str:
    """Print the report; returns it."""
    options = parse(sys.argv[1:] if argv is None else argv)
    records = read_all(options.files)
    if not final(records):
        raise ValueError(f"There is no finished training in {', '.join(map(str, options.files))}.")
    known = [method.name for method in ABLATIONS[options.compare]]
    summaries = summarise(records, known)
    names = [summary.method for summary in summaries]
    reference = options.against or (TUNED if TUNED in names else names[0])
    if reference not in names:
        raise ValueError(f"against={reference!r} has no results, but must be among {', '.join(map(repr, names))}.")
    groups = task_groups(final(records))
    settings = final(records)[0]["settings"]
    machines = sorted({f"{record['hardware']}, torch {record['torch']}" for record in records})
    seeds = len({record["settings"]["seed"] for record in final(records)})
    hours = sum(record["seconds"] for record in records) / 3600
    lines = [
        f"Test accuracy in percent, mean ± standard deviation of {seeds} seeds. Backbone {settings['model']}, recipe "
        f"{settings['recipe']}, {settings['epochs']} epochs, {settings['batch_size']} images a step. "
        f"{'; '.join(machines)}; {len(records):,} trainings, {hours:.1f} hours of process time.",
        "Groups: " + "; ".join(f"{task} {group}" for task, group in groups.items()) + ".",
        markdown(summaries, list(groups)),
        differences(records, names, reference),
    ]
    for summary in summaries:
        if summary.incomplete:
            lines.append(
                f"Not finished: {summary.method} on {', '.join(f'{t} (seed {s})' for t, s in summary.incomplete)}."
            )
    if edges := at_the_edge(records):
        lines.append("Best learning rate at the edge of what was tried: " + "; ".join(edges) + ".")
    report = "\n\n".join(lines)
    print(report)
    if options.plot:
        plot = plot_parameters if options.compare == "methods" else plot_variants
        plot(summaries, options.mean).savefig(options.plot, dpi=150)
    return report


if __name__ == "__main__":
    main()
