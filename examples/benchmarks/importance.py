"""How well each score of `score_prompts` predicts what removing a prompt, or a segment of one, does to the loss; and
what is lost when half of the prompts and half of the segments are pruned by the default score.

    python examples/benchmarks/importance.py                              # handwritten digits, the shipped backbone
    python examples/benchmarks/importance.py --data_dir DATA --out A.jsonl       # and every folder of parquet in DATA
    python examples/benchmarks/importance.py --tables A.jsonl B.jsonl            # tables of finished runs

A run is one task, depth and seed. Prompts and a head are trained; each method scores the prompts on the training
images, in float32 and in float64. Its scores are compared, by Spearman's rank correlation, with the true change of the
loss when that token or segment is left out, on the images that were scored and on unseen ones. Then the prompts are
pruned, rewound and trained again, and both accuracies on the test images are taken. Killed and started again with the
same `--out`, finished runs are not repeated.
"""

from __future__ import annotations

import importlib.util
import json
import sys
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

from e2vpt_peft import E2VPTConfig, E2VPTLayer, PromptScores, prune_prompts, rewind_prompts, score_prompts
from e2vpt_peft.importance import SCORING_METHODS

EXAMPLES = Path(__file__).parents[1]
DIGITS = "digits"
DTYPES = {"float32": torch.float32, "float64": torch.float64}
COLUMNS = {
    "tokens": "tokens",
    "segments": "segments",
    "tokens_unseen": "tokens, unseen data",
    "segments_unseen": "segments, unseen data",
}

Batches = list[dict[str, torch.Tensor]]


def load_quickstart() -> Any:
    """The quickstart as a module: its data, preprocessing and backbone serve here, too."""
    spec = importlib.util.spec_from_file_location("quickstart", EXAMPLES / "quickstart.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["quickstart"] = module
    spec.loader.exec_module(module)
    return module


@dataclass
class Arguments:
    """Options of the measurement."""

    model: str = field(default=str(EXAMPLES / "backbone"), metadata={"help": "Backbone: a Hub id or a folder."})
    data_dir: str | None = field(default=None, metadata={"help": "Folder with a folder of parquet files per task."})
    tasks: list[str] | None = field(
        default=None, metadata={"help": f"Names of folders in data_dir, and {DIGITS}; default: all of them."}
    )
    seeds: int = field(default=3, metadata={"help": "Runs per task and depth."})
    depths: list[str] = field(default_factory=lambda: ["deep", "shallow"], metadata={"help": "Visual prompt depths."})
    train_per_class: int = field(default=10, metadata={"help": "Training images per class, which are scored on."})
    unseen_images: int = field(default=150, metadata={"help": "Unseen images to compare scores on."})
    max_test_images: int = field(default=1000, metadata={"help": "Images for the accuracy."})
    epochs: int = field(default=40, metadata={"help": "Epochs of training."})
    learning_rate: float = field(default=1e-2, metadata={"help": "Peak learning rate (AdamW)."})
    num_visual_prompts: int = field(default=10, metadata={"help": "Visual prompts."})
    num_segments: int = field(default=16, metadata={"help": "Segments of each."})
    token_rate: float = field(default=0.5, metadata={"help": "Share of the visual prompts to prune."})
    segment_rate: float = field(default=0.5, metadata={"help": "Share of their segments to prune."})
    threads: int = field(default=2, metadata={"help": "CPU threads."})
    out: str | None = field(default=None, metadata={"help": "Append one JSON line per run to this file."})
    tables: list[str] | None = field(default=None, metadata={"help": "Print the tables of these files, run nothing."})


def batches(data: Dataset, size: int = 100) -> Batches:
    """All images, in batches, as inputs of the model."""
    loader = DataLoader(data, batch_size=size)
    return [{"pixel_values": batch["pixel_values"], "labels": batch["labels"]} for batch in loader]


def train(model: PeftModel, images: Batches, args: Arguments, seed: int) -> None:
    """Train prompts and head in a plain loop; the same seed gives the same batches."""
    set_seed(seed)
    inputs = {name: torch.cat([batch[name] for batch in images]) for name in images[0]}
    number = len(inputs["labels"])
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=args.learning_rate)
    steps = args.epochs * -(-number // 32)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in range(args.epochs):
        for chosen in torch.randperm(number).split(32):
            model(**{name: tensor[chosen] for name, tensor in inputs.items()}).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: PeftModel, images: Batches) -> float:
    hits = [model(pixel_values=batch["pixel_values"]).logits.argmax(-1) == batch["labels"] for batch in images]
    return float(torch.cat(hits).float().mean())


def rank_correlation(scores: torch.Tensor, truth: torch.Tensor) -> float:
    return float(spearmanr(scores.flatten().numpy(), truth.flatten().numpy()).statistic)


def correlations(scores: PromptScores, truth: PromptScores, unseen: PromptScores) -> dict[str, float]:
    return {
        "tokens": rank_correlation(scores.tokens, truth.tokens),
        "segments": rank_correlation(scores.segments, truth.segments),
        "tokens_unseen": rank_correlation(scores.tokens, unseen.tokens),
        "segments_unseen": rank_correlation(scores.segments, unseen.segments),
    }


def inverse_variance(model: PeftModel) -> torch.Tensor:
    """What the factor on a token is multiplied with in its gradient, if a LayerNorm follows, but for its eps."""
    layers = [module for module in model.modules() if isinstance(module, E2VPTLayer)]
    prompts = [layer.visual_prompts("default") for layer in layers]
    return torch.stack([1 / values.double().var(-1, correction=0) for values in prompts if values is not None]).mean(0)


def run(args: Arguments, quickstart: Any, task: str, depth: str, seed: int) -> dict[str, Any]:
    """Train, score by every method, prune, rewind and train again."""
    settings = quickstart.QuickstartArguments(
        model=args.model,
        dataset=None if task == DIGITS else str(Path(args.data_dir or "", task)),
        train_per_class=args.train_per_class,
        max_test_images=args.max_test_images,
        seed=seed,
    )
    train_set, test_set = quickstart.load_data(settings)
    prepare = partial(quickstart.preprocess, AutoImageProcessor.from_pretrained(args.model))
    seen, test = (batches(part.with_transform(prepare)) for part in (train_set, test_set))
    unseen = batches(test_set.select(range(min(args.unseen_images, len(test_set)))).with_transform(prepare))

    config = E2VPTConfig(
        num_visual_prompts=args.num_visual_prompts,
        visual_prompt_depth=depth,  # type: ignore[arg-type]
        num_segments=args.num_segments,
        modules_to_save=[quickstart.HEAD],
    )
    model: Any = get_peft_model(quickstart.load_backbone(settings, train_set.features["label"], seed), config)
    train(model, seen, args, seed)
    score = partial(score_prompts, model, progress_bar=False)
    truth, unseen_truth = score(seen, "leave_one_out"), score(unseen, "leave_one_out")
    result: dict[str, Any] = {
        "task": task,
        "depth": depth,
        "seed": seed,
        "accuracy": accuracy(model, test),
        "test_images": len(test_set),
        "parameters": model.get_nb_trainable_parameters()[0],
        "methods": defaultdict(dict),
    }
    absolute = {}
    for name, dtype in DTYPES.items():
        model.to(dtype)
        inputs = [{**batch, "pixel_values": batch["pixel_values"].to(dtype)} for batch in seen]
        for method in SCORING_METHODS:
            is_truth = method == "leave_one_out" and dtype == torch.float32
            # In float64 leaving out each segment would take longest, and find the same.
            if is_truth or method != "leave_one_out":
                scores = truth if is_truth else score(inputs, method)
                result["methods"][method][name] = correlations(scores, truth, unseen_truth)
                if method == "absolute":
                    absolute[name] = scores.tokens
    model.to(torch.float32)
    result["absolute_token_scores"] = {
        "largest": float(absolute["float64"].max()),
        "float32_against_float64": rank_correlation(absolute["float32"], absolute["float64"]),
        "float64_against_inverse_variance": rank_correlation(absolute["float64"], inverse_variance(model)),
    }
    prune_prompts(model, score(seen), args.token_rate, args.segment_rate)
    rewind_prompts(model)
    train(model, seen, args, seed)
    result["pruned_accuracy"] = accuracy(model, test)
    result["pruned_parameters"] = model.get_nb_trainable_parameters()[0]
    return result


def runs(args: Arguments, done: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """All runs that are not done yet."""
    quickstart = load_quickstart()
    folders = [] if args.data_dir is None else sorted(path for path in Path(args.data_dir).iterdir() if path.is_dir())
    finished = {(result["task"], result["depth"], result["seed"]) for result in done}
    for task in args.tasks or [DIGITS, *(folder.name for folder in folders)]:
        for seed in range(args.seeds):
            for depth in args.depths:
                if (task, depth, seed) not in finished:
                    yield run(args, quickstart, task, depth, seed)


def read(paths: list[str]) -> list[dict[str, Any]]:
    """The results in files of JSON lines; a line that was cut off is left out."""
    results = []
    for path in map(Path, paths):
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                results.append(json.loads(line))
            except json.JSONDecodeError:
                print(f"left out a line that was cut off in {path}")
    return results


def grouped(results: list[dict[str, Any]], key: Callable[[dict[str, Any]], Any]) -> dict[Any, list[dict[str, Any]]]:
    groups: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        groups[key(result)].append(result)
    return groups


def table_of_scores(results: list[dict[str, Any]], by_task: bool = False) -> str:
    """Mean (lowest) rank correlation by depth and method, or the mean by task, too."""
    lines = [
        f"| prompts | {'task | ' if by_task else ''}score | computed in | {' | '.join(COLUMNS.values())} |",
        "|---" * (len(COLUMNS) + 3 + by_task) + "|",
    ]
    key = (lambda run: (run["depth"], run["task"])) if by_task else (lambda run: (run["depth"],))
    for place, part in grouped(results, key).items():
        for method in SCORING_METHODS:
            for dtype in DTYPES:
                found = [run["methods"][method][dtype] for run in part if dtype in run["methods"][method]]
                if found and (dtype == "float32" or not by_task):
                    values = [np.array([run[column] for run in found]) for column in COLUMNS]
                    cells = [f"{v.mean():+.2f}" + ("" if by_task else f" ({v.min():+.2f})") for v in values]
                    lines.append(f"| {' | '.join(place)} | `{method}` | {dtype} | {' | '.join(cells)} |")
    return "\n".join(lines)


def table_of_accuracies(results: list[dict[str, Any]]) -> str:
    """Accuracy of all prompts and of the pruned ones, by depth and task.

    The standard error is that of the mean difference over seeds.
    """
    lines = [
        "| prompts | task | seeds | parameters | left | accuracy | pruned | difference ± standard error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    by_depth = grouped(results, lambda run: (run["depth"], "all tasks"))
    for (depth, task), part in {**grouped(results, lambda run: (run["depth"], run["task"])), **by_depth}.items():
        before, after = (np.array([run[name] for run in part]) for name in ("accuracy", "pruned_accuracy"))
        difference = after - before
        error = difference.std(ddof=1) / len(part) ** 0.5 if len(part) > 1 else float("nan")
        parameters, left = (np.mean([run[name] for run in part]) for name in ("parameters", "pruned_parameters"))
        lines.append(
            f"| {depth} | {task} | {len(part)} | {parameters:,.0f} | {left / parameters:.0%} | {before.mean():.1%} | "
            f"{after.mean():.1%} | {100 * difference.mean():+.1f} ± {100 * error:.1f} points |"
        )
    return "\n".join(lines)


def table_of_absolute_scores(results: list[dict[str, Any]]) -> str:
    """What the paper's token score is made of."""
    lines = [
        "| prompts | largest score | ranks in float32 against float64 | in float64 against the inverse variance |",
        "|---|---|---|---|",
    ]
    for depth, part in grouped(results, lambda run: run["depth"]).items():
        rows = [run["absolute_token_scores"] for run in part]
        largest = [row["largest"] for row in rows]
        ranks = [
            np.mean([row[name] for row in rows])
            for name in ("float32_against_float64", "float64_against_inverse_variance")
        ]
        lines.append(f"| {depth} | {min(largest):.0e} to {max(largest):.0e} | {ranks[0]:+.2f} | {ranks[1]:+.2f} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print the tables, and return the results."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(argv)  # type: ignore[arg-type]
    torch.set_num_threads(args.threads)
    results = read(args.tables or ([args.out] if args.out else []))
    for result in [] if args.tables else runs(args, list(results)):
        results.append(result)
        print(json.dumps({name: value for name, value in result.items() if name != "methods"}), flush=True)
        if args.out:
            with open(args.out, "a") as file:
                file.write(json.dumps({**result, "arguments": asdict(args)}) + "\n")
    print(f"\n{table_of_scores(results)}\n\n{table_of_scores(results, by_task=True)}")
    print(f"\n{table_of_accuracies(results)}\n\n{table_of_absolute_scores(results)}")
    return results


if __name__ == "__main__":
    main()
