"""Tables of the final accuracies. What is a mean of what is named."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from .records import PLAN, Record
from .tasks import GROUPS

MEANS = ("mean of groups", "mean of tasks")


@dataclass(frozen=True)
class Score:
    """Mean and standard deviation over seeds, in percent. One seed has no deviation."""

    mean: float
    deviation: float | None
    seeds: int

    def __str__(self) -> str:
        spread = "" if self.deviation is None else f" ± {self.deviation:.1f}"
        return f"{self.mean:.1f}{spread}"


def score(values: Sequence[float]) -> Score:
    """Of accuracies in [0, 1], one per seed."""
    return Score(100 * fmean(values), 100 * stdev(values) if len(values) > 1 else None, len(values))


@dataclass(frozen=True)
class Summary:
    """One method: its score on each task, on each group (mean of its tasks), and both means, all seed by seed.

    `adapted` and `head` are its trainable parameters, those of the head apart, as means over tasks and seeds.
    `seconds` is the time of a training, mean over tasks and seeds.
    `fit` is its accuracy in percent on the images it was trained on, mean over tasks and seeds, if all results tell.
    `incomplete` tells why it has no means: it lacks these (task, seed).
    """

    method: str
    tasks: dict[str, Score]
    means: dict[str, Score]
    adapted: float
    head: float
    seconds: float
    incomplete: list[tuple[str, int]]
    fit: float | None = None


def final(records: Iterable[Record]) -> list[Record]:
    """The records of the test split."""
    return [record for record in records if record["settings"]["part"] == "test"]


def task_groups(records: Iterable[Record]) -> dict[str, str]:
    """The tasks there are and their groups, group by group."""
    found = {record["settings"]["task"]: record["settings"]["group"] for record in records}
    return dict(sorted(found.items(), key=lambda item: (GROUPS.index(item[1]), item[0])))


def summarise(records: Sequence[Record], methods: Sequence[str]) -> list[Summary]:
    """One summary for each method that has results, in the given order.

    Raises:
        ValueError: The records are of several plans, which do not compare.
    """
    records = final(records)
    for name in PLAN:
        values = list(dict.fromkeys(record["settings"][name] for record in records))
        if len(values) > 1:
            raise ValueError(f"The results are of several values of {name}: {values}. Give files of one only.")
    groups = task_groups(records)
    seeds = sorted({record["settings"]["seed"] for record in records})
    summaries = []
    for method in methods:
        own = [record for record in records if record["settings"]["method"] == method]
        if not own:
            continue
        found = {(r["settings"]["task"], r["settings"]["seed"]): r["accuracy"] for r in own}
        if len(found) < len(own):
            raise ValueError(f"{method} has several results for one task and seed: were they made by two searches?")
        missing = [(task, seed) for task in groups for seed in seeds if (task, seed) not in found]
        tasks = {
            task: score([found[task, seed] for seed in seeds if (task, seed) in found])
            for task in groups
            if any((task, seed) in found for seed in seeds)
        }
        means = {} if missing else means_of(found, groups, seeds)
        heads = fmean(r["head"] for r in own)
        adapted = fmean(r["trainable"] - r["head"] for r in own)
        seconds = fmean(r["seconds"] for r in own)
        fits = [r["training_accuracy"] for r in own if "training_accuracy" in r]
        fit = 100 * fmean(fits) if len(fits) == len(own) else None
        summaries.append(Summary(method, tasks, means, adapted, heads, seconds, missing, fit))
    return summaries


def means_of(found: dict[tuple[str, int], float], groups: dict[str, str], seeds: Sequence[int]) -> dict[str, Score]:
    """Mean over the tasks of each group, mean of these group means, and mean over all tasks."""
    members: dict[str, list[str]] = defaultdict(list)
    for task, group in groups.items():
        members[group].append(task)
    of_group = {group: [fmean(found[t, seed] for t in tasks) for seed in seeds] for group, tasks in members.items()}
    means = {group: score(values) for group, values in of_group.items()}
    means[MEANS[0]] = score([fmean(values) for values in zip(*of_group.values())])
    means[MEANS[1]] = score([fmean(found[task, seed] for task in groups) for seed in seeds])
    return means


def differences(records: Sequence[Record], methods: Sequence[str], reference: str) -> str:
    """A table of what each method has over one of them, seed by seed, and on how many tasks it wins and loses."""
    found: dict[str, dict[tuple[str, int], float]] = defaultdict(dict)
    for record in final(records):
        settings = record["settings"]
        found[settings["method"]][settings["task"], settings["seed"]] = record["accuracy"]
    rows = [["method", f"points over {reference}", "tasks won", "lost", "tied"]]
    for method in methods:
        own = found[method]
        if method == reference or not own or own.keys() != found[reference].keys():
            continue
        tasks, seeds = (sorted({key[part] for key in own}) for part in (0, 1))  # type: ignore[type-var]
        gaps = {task: [own[task, seed] - found[reference][task, seed] for seed in seeds] for task in tasks}
        signs = [round(fmean(values), 9) for values in gaps.values()]
        wins, losses = sum(sign > 0 for sign in signs), sum(sign < 0 for sign in signs)
        mean = score([fmean(values) for values in zip(*gaps.values())])
        counts = [str(number) for number in (wins, losses, len(tasks) - wins - losses)]
        rows.append([method, f"{'+' * (mean.mean > 0)}{mean}", *counts])
    return as_table(rows)


def markdown(summaries: Sequence[Summary], tasks: Sequence[str]) -> str:
    """Two tables, a row for each method: means and parameters, then every task."""
    names = list(dict.fromkeys(name for summary in summaries for name in summary.means))
    fitted = any(summary.fit is not None for summary in summaries)
    columns = ["method", "parameters without head", "with head", "seconds"]
    overview = [[*columns, *names, *["training images"] * fitted]]
    for summary in summaries:
        counts = [f"{value:,.0f}" for value in (summary.adapted, summary.adapted + summary.head, summary.seconds)]
        shown = [str(summary.means[name]) if name in summary.means else "not finished" for name in names]
        fit = "" if summary.fit is None else f"{summary.fit:.1f}"
        overview.append([summary.method, *counts, *shown, *[fit] * fitted])
    each = [["method", *tasks]]
    for summary in summaries:
        each.append([summary.method, *(str(summary.tasks[t]) if t in summary.tasks else "" for t in tasks)])
    return f"{as_table(overview)}\n\n{as_table(each)}"


def shares(records: Iterable[Record], methods: Sequence[str]) -> str:
    """A table of what prompts are paid of the attention in each layer, in percent, before a training and after it.

    Means over tasks and seeds. Methods without prompts in the attention have no row; if none has one, there is no
    table.
    """
    found: dict[str, list[dict[str, list[float]]]] = defaultdict(list)
    for record in final(records):
        if "shares" in record:
            found[record["settings"]["method"]].append(record["shares"])
    rows = []
    for method in methods:
        for when in ("start", "end"):
            layers = zip(*(shares[when] for shares in found[method]), strict=True)
            means = [f"{100 * fmean(values):.0f}" for values in layers]
            rows += [[f"{method}, {when}", *means]] if means else []
    return as_table([["attention paid to prompts", *map(str, range(len(rows[0]) - 1))], *rows]) if rows else ""


def as_table(rows: Sequence[Sequence[str]]) -> str:
    ruled = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in ruled)


def at_the_edge(records: Iterable[Record]) -> list[str]:
    """The searches whose best learning rate is the lowest or highest that was tried: the true best may lie beyond."""
    tried: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        settings = record["settings"]
        if settings["part"] == "validation" and settings["rates"] is None:
            tried[settings["task"], settings["method"]].append(record)
    found = []
    for (task, method), trials in sorted(tried.items()):
        trials.sort(key=lambda record: record["settings"]["learning_rate"])
        rates = [record["settings"]["learning_rate"] for record in trials]
        best = max(trials, key=lambda record: record["accuracy"])["settings"]["learning_rate"]
        if len(set(rates)) > 2 and best in (rates[0], rates[-1]):
            found.append(f"{method} on {task}: {best:g}")
    return found
