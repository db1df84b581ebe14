"""How well each score of `score_prompts` predicts what removing a prompt, or a segment of one, does to the loss.

    python -m examples.benchmarks.importance                                  # handwritten digits, shipped backbone
    python -m examples.benchmarks.importance --data_dir DATA --model MODEL    # and every parquet set in DATA

For every task, depth and seed, prompts are trained; then each method scores them on the training images. The tables
have the Spearman rank correlation of its scores with the true change of the loss when that token or segment is
removed, on the images that were scored and on unseen ones: means over the runs, and the lowest. With `--out`, finished
runs are kept in a file, and a run that is there is not done again.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from scipy.stats import spearmanr
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, HfArgumentParser, set_seed

from e2vpt_peft import E2VPTConfig, PromptScores, score_prompts
from e2vpt_peft.pruning import SCORING_METHODS
from examples.data_and_backbone import BACKBONE, HEAD, load_backbone, load_data, preprocess

NOT_SETTINGS = {"data_dir", "out", "threads", "tasks", "seeds", "depths", "what"}
"""Options that say which runs there are, not what a run gives."""
GRADIENT_SCORES = ("absolute", "signed", "first_order")

Batches = list[dict[str, torch.Tensor]]
Result = dict[str, Any]


@dataclass
class Options:
    """Options of all measurements of pruning."""

    model: str = field(default=BACKBONE, metadata={"help": "Backbone: a Hub id or a folder."})
    data_dir: str | None = field(default=None, metadata={"help": "Folder with a folder of parquet files per task."})
    tasks: list[str] | None = field(
        default=None, metadata={"help": "Names of folders in data_dir, and digits; default all."}
    )
    seeds: int = field(default=3, metadata={"help": "Runs per task."})
    train_per_class: int = field(default=20, metadata={"help": "Training images per class."})
    max_test_images: int = field(default=400, metadata={"help": "Unseen images."})
    epochs: int = field(default=40, metadata={"help": "Epochs of a training."})
    num_visual_prompts: int = field(default=10, metadata={"help": "Visual prompts."})
    num_segments: int = field(default=16, metadata={"help": "Segments of each."})
    threads: int = field(default=2, metadata={"help": "CPU threads."})
    out: str | None = field(default=None, metadata={"help": "Keep results in this file, as JSON lines, and go on."})


@dataclass
class Arguments(Options):
    """Options of the measurement of scores."""

    learning_rate: float = field(default=1e-2, metadata={"help": "Peak learning rate (AdamW)."})
    depths: list[str] = field(default_factory=lambda: ["deep", "shallow"], metadata={"help": "Visual prompt depths."})
    segments_checked: int = field(
        default=0, metadata={"help": "Remove so many segments, drawn at random, to see what it does; 0: all of them."}
    )


class Results:
    """What was measured, in memory and in a file, from which finished runs are taken."""

    def __init__(self, options: Options) -> None:
        self.settings = {name: value for name, value in asdict(options).items() if name not in NOT_SETTINGS}
        self.out = Path(options.out) if options.out else None
        self.kept: list[Result] = []
        if self.out is not None and self.out.exists():
            rows = [json.loads(line) for line in self.out.read_text().splitlines()]
            self.kept = [row for row in rows if row["settings"] == self.settings]

    def find(self, **run: Any) -> list[Result]:
        """The results of a run."""
        return [row for row in self.kept if run.items() <= row.items()]

    def add(self, rows: list[Result]) -> list[Result]:
        """Keep the results of a run, all at once: a run in the file is complete."""
        rows = [{**row, "settings": self.settings} for row in rows]
        self.kept += rows
        text = "".join(json.dumps(row) + "\n" for row in rows)
        if self.out is not None:
            with self.out.open("a") as file:
                file.write(text)
        print(text, end="", flush=True)
        return rows


def runs(options: Options) -> Iterator[tuple[str, int, str | None]]:
    """Name of the task, seed, and data set, of every run; all tasks of a seed before the next seed."""
    folders: dict[str, str | None] = {"digits": None}
    if options.data_dir is not None:
        folders |= {p.name: str(p) for p in sorted(Path(options.data_dir).iterdir()) if p.is_dir()}
    for seed in range(options.seeds):
        for name in options.tasks or folders:
            yield name, seed, folders[name]


def load_task(options: Options, dataset: str | None, seed: int) -> tuple[Dataset, Dataset]:
    """The training and test split of a task."""
    return load_data(dataset, options.train_per_class, options.max_test_images, seed)


def batches(options: Options, data: Dataset, size: int = 100) -> Batches:
    """All images, in batches, as inputs of the model."""
    processor = AutoImageProcessor.from_pretrained(options.model)
    loader = DataLoader(data.with_transform(partial(preprocess, processor)), batch_size=size)
    return [{"pixel_values": b["pixel_values"], "labels": b["labels"]} for b in loader]


def make_model(options: Options, train: Dataset, seed: int, depth: str = "deep") -> PeftModel:
    """The backbone with prompts and a head for the labels, as initialised from the seed."""
    model = load_backbone(options.model, train.features["label"], seed)
    config = E2VPTConfig(
        num_visual_prompts=options.num_visual_prompts,
        visual_prompt_depth=depth,  # type: ignore[arg-type]
        num_segments=options.num_segments,
        modules_to_save=[HEAD],
    )
    return get_peft_model(model, config)


def fit(model: PeftModel, images: Batches, epochs: int, learning_rate: float, seed: int) -> None:
    """Train prompts and head in a plain loop."""
    set_seed(seed)
    model.train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=learning_rate)
    everything = {name: torch.cat([batch[name] for batch in images]) for name in images[0]}
    count = len(everything["labels"])
    steps = epochs * -(-count // 32)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    for _ in range(epochs):
        for chosen in torch.randperm(count).split(32):
            model(**{name: tensor[chosen] for name, tensor in everything.items()}).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    model.eval()


def visual_prompts(model: PeftModel) -> list[torch.nn.Parameter]:
    """Of each layer that has some, (number of prompts, hidden size)."""
    return [parameter for name, parameter in model.named_parameters() if "e2vpt_visual_prompts" in name]


@torch.no_grad()
def loss_with(model: PeftModel, images: Batches, edit: Callable[[torch.Tensor], torch.Tensor] | None = None) -> float:
    """The mean loss over the batches, with the prompts of every layer changed by `edit`."""
    prompts = visual_prompts(model)
    before = [parameter.data for parameter in prompts]
    for parameter in prompts if edit else []:
        assert edit is not None
        parameter.data = edit(parameter.data)
    losses = [float(model(**batch).loss) for batch in images]
    for parameter, data in zip(prompts, before):
        parameter.data = data
    return float(np.mean(losses))


def removals(model: PeftModel, images: Batches, segments: list[int], num_segments: int) -> PromptScores:
    """The true change of the loss when each token, and each of some segments, is removed, one at a time."""
    loss = loss_with(model, images)
    count = len(visual_prompts(model)[0])

    def without_token(token: int) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda prompts: torch.cat([prompts[:token], prompts[token + 1 :]])

    def without_segment(index: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def edit(prompts: torch.Tensor) -> torch.Tensor:
            prompts = prompts.clone()
            prompts[index // num_segments, index % num_segments :: num_segments] = 0
            return prompts

        return edit

    tokens = [loss_with(model, images, without_token(token)) - loss for token in range(count)]
    parts = [loss_with(model, images, without_segment(index)) - loss for index in segments]
    return PromptScores(torch.tensor(tokens), torch.tensor(parts), "leave_one_out")


def rank_correlation(scores: torch.Tensor, truth: torch.Tensor) -> float:
    return float(spearmanr(scores.flatten().numpy(), truth.flatten().numpy()).statistic)


def sizes_of_terms(model: PeftModel, images: Batches) -> torch.Tensor:
    """Of each token, |prompt| |gradient|, summed over layers: the rounding error of their product is in proportion."""
    prompts = visual_prompts(model)
    total = torch.zeros(len(prompts[0]), dtype=torch.float64)
    for batch in images:
        gradients = torch.autograd.grad(model(**batch).loss, prompts)
        for prompt, gradient in zip(prompts, gradients):
            total += (prompt.detach().norm(dim=-1) * gradient.norm(dim=-1)).double()
    return total


def measure_run(args: Arguments, name: str, dataset: str | None, depth: str, seed: int) -> list[Result]:
    """One result for each method, and more for those that are made in float64, too."""
    train, test = load_task(args, dataset, seed)
    seen, unseen = batches(args, train), batches(args, test)
    model = make_model(args, train, seed, depth)
    fit(model, seen, args.epochs, args.learning_rate, seed)
    number = args.num_visual_prompts * args.num_segments
    order = np.random.default_rng(seed).permutation(number)
    checked = sorted(order[: args.segments_checked or number].tolist())
    truth, unseen_truth = (removals(model, images, checked, args.num_segments) for images in (seen, unseen))
    sizes = sizes_of_terms(model, seen)

    def result(scores: PromptScores, method: str, dtype: str) -> Result:
        segments = scores.segments if method == "leave_one_out" else scores.segments.flatten()[checked]
        return {
            "task": name,
            "depth": depth,
            "seed": seed,
            "method": method,
            "dtype": dtype,
            "tokens": rank_correlation(scores.tokens, truth.tokens),
            "segments": rank_correlation(segments, truth.segments),
            "tokens_unseen": rank_correlation(scores.tokens, unseen_truth.tokens),
            "segments_unseen": rank_correlation(segments, unseen_truth.segments),
            "token_scale": float(scores.tokens.abs().mean()),
            "tokens_by_sizes_of_terms": rank_correlation(scores.tokens, sizes),
        }

    results = []
    single = {}
    for method in SCORING_METHODS:
        scores = truth
        if method != "leave_one_out":
            scores = single[method] = score_prompts(model, seen, method, progress_bar=False)
        results.append(result(scores, method, "float32"))
    model.double()
    doubled = [{**batch, "pixel_values": batch["pixel_values"].double()} for batch in seen]
    for method in GRADIENT_SCORES:
        scores = score_prompts(model, doubled, method, progress_bar=False)
        agreement = rank_correlation(scores.tokens, single[method].tokens)
        results.append({**result(scores, method, "float64"), "tokens_by_float32": agreement})
    return results


def measure(args: Arguments) -> list[Result]:
    """The results of every task, seed and depth."""
    results, measured = Results(args), []
    for name, seed, dataset in runs(args):
        for depth in args.depths:
            found = results.find(task=name, depth=depth, seed=seed)
            measured += found or results.add(measure_run(args, name, dataset, depth, seed))
    return measured


def table(results: list[Result], by_task: bool = False) -> str:
    """Mean (lowest) rank correlation by depth and method, or by task, depth and method."""
    keys = ["depth", "method", "dtype"]
    if by_task:
        keys.insert(0, "task")
    groups: dict[tuple[str, ...], list[Result]] = defaultdict(list)
    for row in results:
        groups[tuple(row[key] for key in keys)].append(row)
    columns = ["tokens", "segments", "tokens_unseen", "segments_unseen"]
    heads = [*(["task"] if by_task else []), "prompts", "score", "precision", "runs", "tokens", "segments"]
    heads += ["tokens, unseen data", "segments, unseen data"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for (*names, method, dtype), rows in sorted(groups.items(), key=lambda group: group[0][: len(keys) - 2]):
        values = {column: np.array([row[column] for row in rows]) for column in columns}
        cells = [f"{values[column].mean():+.2f} ({values[column].min():+.2f})" for column in columns]
        lines.append(f"| {' | '.join([*names, f'`{method}`', dtype, str(len(rows)), *cells])} |")
    return "\n".join(lines)


def precision_table(results: list[Result]) -> str:
    """What float32 does to the paper's score of tokens: its mean size, and what it ranks tokens by."""
    lines = [
        "| prompts | precision | mean size | rank correlation with float32 | with \\|prompt\\| \\|gradient\\| |",
        "|---|---|---|---|---|",
    ]
    for depth in sorted({row["depth"] for row in results}):
        for dtype in ("float32", "float64"):
            rows = [r for r in results if (r["depth"], r["method"], r["dtype"]) == (depth, "absolute", dtype)]
            size = np.mean([row["token_scale"] for row in rows])
            same = np.mean([row.get("tokens_by_float32", 1.0) for row in rows])
            terms = np.mean([row["tokens_by_sizes_of_terms"] for row in rows])
            lines.append(f"| {depth} | {dtype} | {size:.1e} | {same:+.2f} | {terms:+.2f} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> list[Result]:
    """Measure, print the tables, and return the results."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(argv)  # type: ignore[arg-type]
    torch.set_num_threads(args.threads)
    results = measure(args)
    print(f"\n{table(results)}\n\n{table(results, by_task=True)}\n\n{precision_table(results)}")
    return results


if __name__ == "__main__":
    main()
