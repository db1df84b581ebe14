"""How well each score of `score_prompts` predicts what removing a prompt, or a segment of one, does to the loss.

    python examples/benchmarks/importance.py                                  # handwritten digits, the shipped
    backbone python examples/benchmarks/importance.py --data_dir DATA --model MODEL    # and every parquet set in DATA

For every task, depth and seed, prompts are trained; then each method scores them on training images. The table has the
Spearman rank correlation of its scores with the true change of the loss when that token or segment is removed
(leave-one-out), on the images that were scored and on unseen ones: means over the runs, and the lowest.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
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
from e2vpt_peft.importance import SCORING_METHODS

EXAMPLES = Path(__file__).parents[1]


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
    seeds: int = field(default=3, metadata={"help": "Runs per task and depth."})
    depths: list[str] = field(default_factory=lambda: ["deep", "shallow"], metadata={"help": "Visual prompt depths."})
    train_per_class: int = field(default=20, metadata={"help": "Training images per class."})
    max_test_images: int = field(default=400, metadata={"help": "Unseen images."})
    epochs: int = field(default=40, metadata={"help": "Epochs of training before scoring."})
    learning_rate: float = field(default=1e-2, metadata={"help": "Peak learning rate (AdamW)."})
    num_visual_prompts: int = field(default=10, metadata={"help": "Visual prompts."})
    num_segments: int = field(default=16, metadata={"help": "Segments of each."})
    float64: bool = field(default=False, metadata={"help": "Score in float64."})
    threads: int = field(default=2, metadata={"help": "CPU threads."})
    out: str | None = field(default=None, metadata={"help": "Append one JSON line per run and method to this file."})


def batches(data: Dataset, dtype: torch.dtype, size: int = 100) -> list[dict[str, torch.Tensor]]:
    """All images, in batches, as inputs of the model."""
    loader = DataLoader(data, batch_size=size)
    return [{"pixel_values": b["pixel_values"].to(dtype), "labels": b["labels"]} for b in loader]


def train_prompts(args: Arguments, quickstart: Any, task: Any, train: Dataset, depth: str, seed: int) -> PeftModel:
    """Prompts and a head, trained in a plain loop."""
    model = quickstart.load_backbone(task, train.features["label"], seed)
    config = E2VPTConfig(
        num_visual_prompts=args.num_visual_prompts,
        visual_prompt_depth=depth,  # type: ignore[arg-type]
        num_segments=args.num_segments,
        modules_to_save=[quickstart.HEAD],
    )
    model = get_peft_model(model, config).train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=args.learning_rate)
    processor = AutoImageProcessor.from_pretrained(args.model)
    prepared = train.with_transform(partial(quickstart.preprocess, processor))
    images = batches(prepared, torch.float32, len(train))[0]
    steps = args.epochs * -(-len(train) // 32)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=steps, pct_start=0.1)
    for _ in range(args.epochs):
        for chosen in torch.randperm(len(train)).split(32):
            model(**{name: tensor[chosen] for name, tensor in images.items()}).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return model.eval()


def rank_correlation(scores: torch.Tensor, truth: torch.Tensor) -> float:
    return float(spearmanr(scores.flatten().numpy(), truth.flatten().numpy()).statistic)


def measure(args: Arguments) -> Iterator[dict[str, Any]]:
    """One result per task, depth, seed and method."""
    quickstart = load_quickstart()
    folders = (
        [None] if args.data_dir is None else [None, *sorted(p for p in Path(args.data_dir).iterdir() if p.is_dir())]
    )
    dtype = torch.float64 if args.float64 else torch.float32
    for folder in folders:
        for seed in range(args.seeds):
            task = quickstart.QuickstartArguments(
                model=args.model,
                dataset=None if folder is None else str(folder),
                train_per_class=args.train_per_class,
                max_test_images=args.max_test_images,
                seed=seed,
            )
            train, test = quickstart.load_data(task)
            processor = AutoImageProcessor.from_pretrained(args.model)
            seen, unseen = (
                batches(part.with_transform(partial(quickstart.preprocess, processor)), dtype)
                for part in (train, test)
            )
            for depth in args.depths:
                set_seed(seed)
                model = train_prompts(args, quickstart, task, train, depth, seed).to(dtype)
                truth = score_prompts(model, seen, "leave_one_out", progress_bar=False)
                unseen_truth = score_prompts(model, unseen, "leave_one_out", progress_bar=False)
                for method in SCORING_METHODS:
                    scores = truth
                    if method != "leave_one_out":
                        scores = score_prompts(model, seen, method, progress_bar=False)
                    run = {"task": folder.name if folder else "digits", "depth": depth, "seed": seed, "method": method}
                    yield {**run, **correlations(scores, truth, unseen_truth)}


def correlations(scores: PromptScores, truth: PromptScores, unseen: PromptScores) -> dict[str, float]:
    return {
        "tokens": rank_correlation(scores.tokens, truth.tokens),
        "segments": rank_correlation(scores.segments, truth.segments),
        "tokens_unseen": rank_correlation(scores.tokens, unseen.tokens),
        "segments_unseen": rank_correlation(scores.segments, unseen.segments),
    }


def table(results: list[dict[str, Any]]) -> str:
    """Mean (lowest) rank correlation by depth and method."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        groups[result["depth"], result["method"]].append(result)
    columns = ["tokens", "segments", "tokens_unseen", "segments_unseen"]
    lines = [
        "| prompts | score | tokens | segments | tokens, unseen data | segments, unseen data |",
        "|---|---|---|---|---|---|",
    ]
    for (depth, method), runs in groups.items():
        cells = []
        for column in columns:
            values = np.array([run[column] for run in runs])
            cells.append(f"{values.mean():+.2f} ({values.min():+.2f})")
        lines.append(f"| {depth} | `{method}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print the table, and return the results."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(argv)  # type: ignore[arg-type]
    torch.set_num_threads(args.threads)
    results = []
    for result in measure(args):
        results.append(result)
        print(json.dumps(result), flush=True)
        if args.out:
            with open(args.out, "a") as file:
                file.write(json.dumps({**result, "arguments": asdict(args)}) + "\n")
    print(f"\n{table(results)}")
    return results


if __name__ == "__main__":
    main()
