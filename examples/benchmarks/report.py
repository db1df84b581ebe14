"""Tables and a picture of what `compare.py` measured.

    python -m examples.benchmarks.report results/*.jsonl
    python -m examples.benchmarks.report results/*.jsonl --where model=vit-cifar10 epochs=20 --plot results/mini.png
    python -m examples.benchmarks.report results/*.jsonl --compare components --where task=sign_digits

All files are read together. What does not compare (another backbone, recipe, number of epochs) has a section of its
own. What is counted is what is shown: the trainings of these methods on these tasks, those of their searches included.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .accuracy.ablations import ABLATIONS, TUNED
from .accuracy.methods import Method
from .accuracy.plots import plot_parameters, plot_variants
from .accuracy.records import PLAN, Record, by_plan, read_all, select, together
from .accuracy.tables import MEANS, at_the_edge, differences, final, markdown, shares, summarise, task_groups


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="JSON lines, of one or of several machines")
    parser.add_argument("--compare", choices=ABLATIONS, default="methods", help="what to show (default: methods)")
    parser.add_argument(
        "--where",
        nargs="+",
        default=[],
        metavar="SETTING=VALUES",
        help="only results with these settings, for example task=gtsrb,aid epochs=20 image_size=84",
    )
    parser.add_argument(
        "--together",
        nargs="+",
        default=[],
        metavar="SETTING",
        help=f"what does compare, though it differs in this of {', '.join(PLAN)}; of two trainings the first counts",
    )
    parser.add_argument("--against", help="what the others are compared with (default: E²VPT, if it is there)")
    parser.add_argument("--mean", choices=MEANS, default=MEANS[0], help=f"of the plot (default: {MEANS[0]})")
    parser.add_argument("--plot", type=Path, help="save a picture of the accuracies there")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> str:
    """Print the report; returns it."""
    options = parse(sys.argv[1:] if argv is None else argv)
    wanted = {name: values.split(",") for name, _, values in (part.partition("=") for part in options.where)}
    methods = ABLATIONS[options.compare]
    chosen = together(select(read_all(options.files), wanted), options.together)
    plans = [plan for plan in by_plan(chosen) if final(shown(plan, methods))]
    if not plans:
        raise ValueError(
            f"There is no finished training of --compare {options.compare} in {', '.join(map(str, options.files))}."
        )
    report = "\n\n".join(section(shown(plan, methods), methods, options.against) for plan in plans)
    print(report)
    if options.plot:
        if len(plans) > 1:
            raise ValueError("plot needs results that compare: choose those of one backbone and so on with --where.")
        plot = plot_parameters if options.compare == "methods" else plot_variants
        plot(summarise(plans[0], [method.name for method in methods]), options.mean).savefig(options.plot, dpi=150)
    return report


def shown(records: Sequence[Record], methods: Sequence[Method]) -> list[Record]:
    """The trainings of these methods, on the tasks they finished one on."""
    names = {name for method in methods for name in (method.name, method.searched_as)}
    own = [record for record in records if record["settings"]["method"] in names]
    tasks = task_groups(final(own))
    return [record for record in own if record["settings"]["task"] in tasks]


def section(records: Sequence[Record], methods: Sequence[Method], against: str | None) -> str:
    """The report of one plan."""
    summaries = summarise(records, [method.name for method in methods])
    names = [summary.method for summary in summaries]
    reference = against or (TUNED if TUNED in names else names[0])
    if reference not in names:
        raise ValueError(f"against={reference!r} has no results, but must be among {', '.join(map(repr, names))}.")
    groups = task_groups(final(records))
    settings = final(records)[0]["settings"]
    machines = sorted({f"{record['hardware']}, torch {record['torch']}" for record in records})
    seeds = len({record["settings"]["seed"] for record in final(records)})
    hours = sum(record["seconds"] for record in records) / 3600
    size = f"{settings['image_size']} pixels, " if settings["image_size"] else ""
    lines = [
        f"Test accuracy in percent, mean ± standard deviation of {seeds} seeds. Backbone {settings['model']}, {size}"
        f"recipe {settings['recipe']}, {settings['epochs']} epochs, {settings['batch_size']} images a step, "
        f"{settings['precision']}. "
        f"{'; '.join(machines)}; {len(records):,} trainings, {hours:.1f} hours of process time.",
        "Groups: " + "; ".join(f"{task} {group}" for task, group in groups.items()) + ".",
        markdown(summaries, list(groups)),
        differences(records, names, reference),
        *filter(None, [shares(records, names)]),
    ]
    for summary in summaries:
        if summary.incomplete:
            lines.append(
                f"Not finished: {summary.method} on {', '.join(f'{t} (seed {s})' for t, s in summary.incomplete)}."
            )
    if edges := at_the_edge(records):
        lines.append("Best learning rate at the edge of what was tried: " + "; ".join(edges) + ".")
    return "\n\n".join(lines)


if __name__ == "__main__":
    main()
