"""What pruning costs in accuracy, and what successive halving saves of the search.

    python -m examples.benchmarks.pruning --what half       # 50 % of tokens and segments pruned, rewound, retrained
    python -m examples.benchmarks.pruning --what search     # halving against the grid

Tasks, backbone and training are those of `importance.py`, and so are `--data_dir`, `--model` and `--out`. Pruned and
unpruned prompts are trained alike, on the same images in the same order. The learning rate of a task is the one with
the best validation accuracy of unpruned prompts, on a seed that is used for nothing else. No choice looks at the test
images.

Both searches are made from the same trainings: what halving trains in its last round is what the grid trains, as in
`E2VPTTrainer`, whose rounds and choice these are.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import HfArgumentParser

from e2vpt_peft import PruningConfig, prune_prompts, rewind_prompts, score_prompts
from e2vpt_peft.adapter import PromptedAdapter
from e2vpt_peft.trainer.candidates import Candidate, list_candidates, plan_rounds, ranked, survivors

from .importance import Batches, Options, Result, Results, batches, fit, load_task, make_model, runs

CHOICE_SEED = 100
"""On which the learning rate is chosen."""


@dataclass
class Arguments(Options):
    """Options of the measurement of pruning."""

    what: str = field(default="half", metadata={"help": "'half' or 'search'.", "choices": ["half", "search"]})
    learning_rates: list[float] = field(
        default_factory=lambda: [3e-3, 1e-2, 3e-2], metadata={"help": "Peak learning rates (AdamW) to choose from."}
    )
    rates: list[float] = field(
        default_factory=lambda: [0.2, 0.4, 0.6, 0.8],
        metadata={"help": "Shares of tokens, and of segments, that the searches try to prune."},
    )
    halving_rounds: int = field(default=3, metadata={"help": "Rounds of halving."})


@dataclass
class Task:
    """Images of a task, and its model as initialised."""

    train: Batches
    validation: Batches
    test: Batches
    model: PeftModel


def prepare(args: Arguments, dataset: str | None, seed: int) -> Task:
    """As many validation images per class as there are training images."""
    twice = replace(args, train_per_class=2 * args.train_per_class)
    images, test = load_task(twice, dataset, seed)
    parts = images.train_test_split(test_size=0.5, stratify_by_column="label", seed=seed)
    splits = [batches(args, data) for data in (parts["train"], parts["test"], test)]
    return Task(*splits, make_model(args, images, seed))


@torch.no_grad()
def accuracy(model: PeftModel, images: Batches) -> float:
    """The share of images that the model names rightly."""
    right = [model(**batch).logits.argmax(-1) == batch["labels"] for batch in images]
    return float(torch.cat(right).float().mean())


def choose_learning_rate(args: Arguments, name: str, dataset: str | None, results: Results) -> float:
    """The one with the best validation accuracy; ties go to the lower one."""
    if len(args.learning_rates) == 1:
        return args.learning_rates[0]
    found: dict[float, float] = {}
    for rate in sorted(args.learning_rates):
        rows = results.find(kind="choice", task=name, learning_rate=rate)
        if not rows:
            task = prepare(args, dataset, CHOICE_SEED)
            fit(task.model, task.train, args.epochs, rate, CHOICE_SEED)
            validation = accuracy(task.model, task.validation)
            rows = results.add([{"kind": "choice", "task": name, "learning_rate": rate, "validation": validation}])
        found[rate] = rows[0]["validation"]
    return max(found, key=lambda rate: found[rate])


def half(args: Arguments, name: str, dataset: str | None, seed: int, results: Results) -> Result:
    """Test accuracy with all prompts, and with half of the tokens and half of the segments of the others."""
    rows = results.find(kind="half", task=name, seed=seed)
    if not rows:
        rate = choose_learning_rate(args, name, dataset, results)
        task = prepare(args, dataset, seed)
        fit(task.model, task.train, args.epochs, rate, seed)
        unpruned = accuracy(task.model, task.test)
        scores = score_prompts(task.model, task.train, progress_bar=False)
        summary = prune_prompts(task.model, scores, token_rate=0.5, segment_rate=0.5)
        rewind_prompts(task.model)
        fit(task.model, task.train, args.epochs, rate, seed)
        row = {"kind": "half", "task": name, "seed": seed, "learning_rate": rate, "unpruned": unpruned}
        row["pruned"] = accuracy(task.model, task.test)
        row["parameters_left"] = summary.parameters_after / summary.parameters_before
        rows = results.add([row])
    return rows[0]


def both_searches(args: Arguments, name: str, dataset: str | None, seed: int, results: Results) -> Result:
    """The winners of the grid and of halving, and the epochs that each spends on candidates."""
    finished = results.find(kind="search", task=name, seed=seed)
    if finished:
        return finished[0]
    rate = choose_learning_rate(args, name, dataset, results)
    task = prepare(args, dataset, seed)
    fit(task.model, task.train, args.epochs, rate, seed)
    unpruned = {"validation": accuracy(task.model, task.validation), "test": accuracy(task.model, task.test)}
    scores = score_prompts(task.model, task.train, progress_bar=False)
    spent: dict[str, float] = defaultdict(float)

    def train(candidate: Candidate, epochs: float) -> None:
        spent[how] += epochs
        training = {"kind": "training", "task": name, "seed": seed, "candidate": candidate.name, "epochs": epochs}
        rows = results.find(**training)
        if not rows:
            rewind_prompts(task.model, undo_pruning=True)
            PromptedAdapter.find(task.model).set_masks(candidate.masks)
            fit(task.model, task.train, int(epochs), rate, seed)
            validation, test = accuracy(task.model, task.validation), accuracy(task.model, task.test)
            rows = results.add([{**training, "validation": validation, "test": test}])
        candidate.metric, tests[candidate.name] = rows[0]["validation"], rows[0]["test"]

    tests: dict[str, float] = {}
    row: dict[str, Any] = {"kind": "search", "task": name, "seed": seed, "learning_rate": rate, "unpruned": unpruned}
    for how in ("grid", "halving"):
        rates = {"token_rates": args.rates, "segment_rates": args.rates}
        config = PruningConfig(**rates, search=how, halving_rounds=args.halving_rounds)
        rewind_prompts(task.model, undo_pruning=True)
        _, candidates = list_candidates(PromptedAdapter.find(task.model), scores, config)
        for count, length in plan_rounds(config, len(candidates), args.epochs):
            candidates = survivors(candidates, count, greater_is_better=True)
            for candidate in candidates:
                train(candidate, length)
        best = ranked(candidates, greater_is_better=True)[0]
        row[how] = {"winner": best.name, "rates": best.rates[0], "parameters": best.parameters}
        row[how] |= {"validation": best.metric, "test": tests[best.name], "epochs": spent[how]}
    return results.add([row])[0]


def half_table(rows: list[Result]) -> str:
    """Mean and standard error of the test accuracy, and of the difference of a run, by task, in per cent."""
    lines = ["| task | runs | learning rate | unpruned | pruned | difference |", "|---|---|---|---|---|---|"]
    tasks: dict[str, list[Result]] = defaultdict(list)
    for row in rows:
        tasks[row["task"]].append(row)
    for name, of_task in tasks.items():
        pruned, unpruned = (np.array([100 * row[key] for row in of_task]) for key in ("pruned", "unpruned"))
        difference = pruned - unpruned
        cells = [f"{unpruned.mean():.1f}{error(unpruned)}", f"{pruned.mean():.1f}{error(pruned)}"]
        cells.append(f"{difference.mean():+.1f}{error(difference)}")
        lines.append(f"| {name} | {len(of_task)} | {of_task[0]['learning_rate']:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def error(values: np.ndarray) -> str:
    """The standard error of the mean, which a single run does not have."""
    return f" ± {values.std(ddof=1) / np.sqrt(len(values)):.1f}" if len(values) > 1 else ""


def search_table(rows: list[Result]) -> str:
    """The winners, with accuracies in per cent, and the share of the grid's epochs that halving needs."""
    heads = ["task", "seed", "unpruned: validation, test", "grid: rates, validation, test"]
    heads += ["halving: rates, validation, test", "same", "epochs"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [row["task"], str(row["seed"]), percent(row["unpruned"])]
        for how in ("grid", "halving"):
            cells.append(f"{row[how]['rates'][0]:g}, {row[how]['rates'][1]:g}, {percent(row[how])}")
        cells.append("yes" if row["grid"]["winner"] == row["halving"]["winner"] else "no")
        cells.append(f"{row['halving']['epochs'] / row['grid']['epochs']:.0%}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def percent(accuracies: dict[str, float]) -> str:
    return f"{accuracies['validation']:.1%}, {accuracies['test']:.1%}"


def main(argv: list[str] | None = None) -> list[Result]:
    """Measure, print the table, and return its rows."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(argv)  # type: ignore[arg-type]
    torch.set_num_threads(args.threads)
    results = Results(args)
    measure, table = (half, half_table) if args.what == "half" else (both_searches, search_table)
    rows = [measure(args, name, dataset, seed, results) for name, seed, dataset in runs(args)]
    print(f"\n{table(rows)}")
    return rows


if __name__ == "__main__":
    main()
