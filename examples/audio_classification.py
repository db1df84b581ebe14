"""Adapt an audio transformer with E²VPT, and compare with its head alone. No network, no GPU needed.

    python examples/audio_classification.py      # pretrains a tiny AST, adapts it with 8 labelled sounds per class
    python examples/audio_classification.py --model MIT/ast-finetuned-audioset-10-10-0.4593

All sounds are generated. By default there is no pretrained backbone either: the script first trains all weights of a
tiny audio spectrogram transformer (AST) to tell twelve kinds of sound apart (tones, chirps, noises, beats), none of
which is a voice. That backbone is frozen and learns from **few labels** to tell vowels apart, sung at any pitch by
voices of any size over noise. Both methods train the same new head on the same sounds for the same number of steps.
Then the adapter is saved, loaded into a fresh backbone, and has to predict the same.

`--model` takes a Hub id or a folder of an AST or a wav2vec2, and leaves the pretraining out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from console import hide_notices
from datasets import Dataset
from head_and_prompts import make_optimizer
from peft import PeftModel, get_peft_model
from progress import show_one_bar
from scipy.signal import lfilter
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTForAudioClassification,
    AutoFeatureExtractor,
    AutoModelForAudioClassification,
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import EvalPrediction

from e2vpt_peft import E2VPTConfig

RATE = 16_000  # samples per second
SECONDS = 0.65
TIME = np.arange(int(RATE * SECONDS)) / RATE

Sound = Callable[[np.random.Generator], np.ndarray]


@dataclass
class AudioArguments:
    """Options of the example."""

    model: str | None = field(
        default=None, metadata={"help": "Backbone: a Hub id or a folder; default: a tiny AST, pretrained here."}
    )
    pretraining_sounds: int = field(default=200, metadata={"help": "Sounds per kind to pretrain the tiny AST on."})
    pretraining_epochs: int = field(default=12, metadata={"help": "Epochs of the pretraining."})
    train_per_class: int = field(default=8, metadata={"help": "Labelled sounds per vowel to train on."})
    test_per_class: int = field(default=100, metadata={"help": "Sounds per vowel to test on."})
    num_visual_prompts: int = field(default=10, metadata={"help": "Prompt tokens in each layer."})
    num_kv_prompts: int = field(default=5, metadata={"help": "Key-value prompts in each layer."})
    epochs: int = field(default=60, metadata={"help": "Epochs, for both methods."})
    batch_size: int = field(default=16, metadata={"help": "Training batch size, for both methods."})
    learning_rate: float = field(default=3e-2, metadata={"help": "Peak learning rate of prompts (AdamW)."})
    head_learning_rate: float = field(
        default=1e-2, metadata={"help": "Peak learning rate of the head (AdamW), for both methods."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the sounds, the initial values and the order."})
    output_dir: str = field(default="audio-output", metadata={"help": "Where backbone and adapter are saved."})


@dataclass
class Result:
    """One line of the table."""

    method: str
    accuracy: float
    trainable: int
    total: int
    file_size: int | None = None


def wave(harmonics: Callable[[np.ndarray], np.ndarray], bend: float = 0.0, vibrato: float = 0.0) -> Sound:
    """A tone of any pitch, with the strength of each harmonic, a bend in octaves per second, and a vibrato."""

    def draw(rng: np.random.Generator) -> np.ndarray:
        pitch = rng.uniform(100, 500) * 2 ** (bend * TIME + vibrato * np.sin(2 * np.pi * rng.uniform(4, 8) * TIME))
        phase = 2 * np.pi * np.cumsum(pitch) / RATE
        numbers = np.arange(1, 15)
        return (harmonics(numbers)[:, None] * np.sin(numbers[:, None] * phase)).sum(0)

    return draw


def noise(low: float, high: float, beats: tuple[float, float] = (0, 0)) -> Sound:
    """Noise between two frequencies; with beats, it comes and goes so many times a second."""

    def draw(rng: np.random.Generator) -> np.ndarray:
        spectrum = np.fft.rfft(rng.standard_normal(len(TIME)))
        frequency = np.fft.rfftfreq(len(TIME), 1 / RATE)
        spectrum[(frequency < low) | (frequency > high)] = 0
        swell = np.sin(2 * np.pi * rng.uniform(*beats) * TIME) > 0 if beats[1] else 1.0
        return np.fft.irfft(spectrum, len(TIME)) * swell

    return draw


def vowel(formants: tuple[float, float, float]) -> Sound:
    """A voice: pulses at the pitch of the vocal cords, through the resonances of a mouth that is larger or smaller."""

    def draw(rng: np.random.Generator) -> np.ndarray:
        pitch = rng.uniform(90, 280) * 2 ** (0.02 * np.sin(2 * np.pi * rng.uniform(4, 7) * TIME))
        sound = np.diff(np.floor(np.cumsum(pitch) / RATE), prepend=0.0)
        size = rng.uniform(0.9, 1.15)
        for formant, bandwidth in zip(formants, (80, 100, 140)):
            radius, angle = np.exp(-np.pi * bandwidth / RATE), 2 * np.pi * formant * size / RATE
            sound = lfilter([1 - radius], [1, -2 * radius * np.cos(angle), radius**2], sound)
        return sound

    return draw


KINDS: dict[str, Sound] = {
    "sine": wave(lambda n: (n == 1) * 1.0),
    "saw": wave(lambda n: 1 / n),
    "square": wave(lambda n: (n % 2) / n),
    "bright": wave(lambda n: (n > 5) * 1.0),
    "octaves": wave(lambda n: np.isin(n, (1, 2, 4, 8)) * 1.0),
    "rising": wave(lambda n: 1 / n**2, bend=1.0),
    "falling": wave(lambda n: 1 / n**2, bend=-1.0),
    "vibrato": wave(lambda n: 1 / n, vibrato=0.1),
    "rumble": noise(0, 800),
    "hum": noise(500, 2000),
    "hiss": noise(2000, 8000),
    "beats": noise(0, 8000, beats=(4, 12)),
}
"""What the tiny AST is pretrained on."""

VOWELS: dict[str, Sound] = {  # formants of English vowels, after Peterson and Barney (1952), men
    "heed": vowel((270, 2290, 3010)),
    "head": vowel((530, 1840, 2480)),
    "had": vowel((660, 1720, 2410)),
    "hod": vowel((730, 1090, 2440)),
    "hood": vowel((440, 1020, 2240)),
    "who'd": vowel((300, 870, 2240)),
}
"""What it is adapted to."""


def generate(sounds: dict[str, Sound], per_class: int, extractor: Callable, rng: np.random.Generator) -> Dataset:
    """So many sounds of each kind, at different loudness over noise, as inputs of a model."""
    waves, labels = [], []
    for label, draw in enumerate(sounds.values()):
        for _ in range(per_class):
            sound = draw(rng)
            sound = sound / np.abs(sound).max() + rng.uniform(0.02, 0.2) * rng.standard_normal(len(TIME))
            waves.append((0.3 * rng.uniform(0.2, 1) * sound).astype(np.float32))
            labels.append(label)
    inputs = extractor(waves, sampling_rate=RATE, return_tensors="np")["input_values"]
    return Dataset.from_dict({"input_values": inputs, "labels": labels}).with_format("torch")


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy."""
    return {"accuracy": float((np.asarray(prediction.predictions).argmax(1) == prediction.label_ids).mean())}


def make_trainer(
    title: str,
    model: torch.nn.Module,
    args: AudioArguments,
    train: Dataset,
    test: Dataset | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    **options: float,
) -> Trainer:
    """A plain Trainer, the same for the pretraining and for both methods."""
    defaults = {"num_train_epochs": args.epochs, "per_device_train_batch_size": args.batch_size}
    training_args = TrainingArguments(
        output_dir=args.output_dir,
        **{**defaults, **options},
        per_device_eval_batch_size=128,
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
        train_dataset=train,
        eval_dataset=test,
        compute_metrics=compute_metrics,
        optimizers=(optimizer, None),
    )
    show_one_bar(trainer, title)
    return trainer


def pretrain(args: AudioArguments) -> str:
    """Train all weights of a tiny AST to name the kinds of sound; the folder where it is saved."""
    folder = str(Path(args.output_dir, "backbone"))
    extractor = ASTFeatureExtractor(num_mel_bins=64, max_length=64)
    sounds = generate(KINDS, args.pretraining_sounds, extractor, np.random.default_rng([args.seed, 0]))
    set_seed(args.seed)
    config = ASTConfig(
        num_mel_bins=extractor.num_mel_bins,
        max_length=extractor.max_length,
        frequency_stride=16,
        time_stride=16,
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=192,
        num_labels=len(KINDS),
    )
    model = ASTForAudioClassification(config)
    epochs = args.pretraining_epochs
    make_trainer(
        "pretraining", model, args, sounds, num_train_epochs=epochs, per_device_train_batch_size=32, learning_rate=1e-3
    ).train()
    model.save_pretrained(folder)
    extractor.save_pretrained(folder)
    return folder


def load_backbone(model: str, seed: int) -> tuple[PreTrainedModel, list[str]]:
    """The pretrained model with a new head for the vowels, initialised from the seed, and the names of what is new."""
    set_seed(seed)
    backbone, loading = AutoModelForAudioClassification.from_pretrained(
        model,
        num_labels=len(VOWELS),
        id2label=dict(enumerate(VOWELS)),
        label2id={name: index for index, name in enumerate(VOWELS)},
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    new = [*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])]
    return backbone, sorted({key.rpartition(".")[0] for key in new} or {"classifier"})


def head_alone(args: AudioArguments, model: str, train: Dataset, test: Dataset) -> Result:
    """Train the head alone."""
    backbone, head = load_backbone(model, args.seed)
    backbone.requires_grad_(False)
    for name in head:
        backbone.get_submodule(name).requires_grad_(True)
    optimizer = make_optimizer(backbone, args.head_learning_rate, args.learning_rate)
    trainer = make_trainer("head alone ", backbone, args, train, test, optimizer)
    trainer.train()
    trainable = sum(p.numel() for p in backbone.parameters() if p.requires_grad)
    return Result("head alone", trainer.evaluate()["eval_accuracy"], trainable, backbone.num_parameters())


def e2vpt(args: AudioArguments, model: str, train: Dataset, test: Dataset) -> tuple[Result, np.ndarray]:
    """Train prompts and the head, and save them. Returns also the logits of the test sounds."""
    backbone, head = load_backbone(model, args.seed)
    config = E2VPTConfig(
        num_visual_prompts=args.num_visual_prompts, num_kv_prompts=args.num_kv_prompts, modules_to_save=head
    )
    adapted = get_peft_model(backbone, config)
    optimizer = make_optimizer(adapted, args.head_learning_rate, args.learning_rate)
    trainer = make_trainer("E²VPT      ", adapted, args, train, test, optimizer)
    trainer.train()
    logits, _, metrics = trainer.predict(test)
    adapted.save_pretrained(args.output_dir)
    trainable, total = adapted.get_nb_trainable_parameters()
    file_size = Path(args.output_dir, "adapter_model.safetensors").stat().st_size
    accuracy = metrics["test_accuracy"] if metrics else float("nan")
    return Result("E²VPT", accuracy, trainable, total, file_size), np.asarray(logits)


def reload(args: AudioArguments, model: str, train: Dataset, test: Dataset) -> np.ndarray:
    """Load the saved adapter into a fresh backbone; the logits of the test sounds."""
    backbone, _ = load_backbone(model, args.seed + 1)
    loaded = PeftModel.from_pretrained(backbone, args.output_dir)
    return np.asarray(make_trainer("reloaded", loaded, args, train, test).predict(test).predictions)


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
    (args,) = HfArgumentParser(AudioArguments).parse_args_into_dataclasses(argv)  # type: ignore[arg-type]
    if args.model is None:
        print(f"Pretraining of a tiny AST: {len(KINDS)} kinds of sound, {args.pretraining_sounds} of each")
    model = args.model or pretrain(args)
    extractor = AutoFeatureExtractor.from_pretrained(model)
    train, test = (
        generate(VOWELS, number, extractor, np.random.default_rng([args.seed, part]))
        for part, number in ((1, args.train_per_class), (2, args.test_per_class))
    )
    print(
        f"\nVowels: {len(VOWELS)} classes, few labels: {len(train)} training sounds "
        f"({args.train_per_class} per class), {len(test)} test sounds"
    )
    baseline = head_alone(args, model, train, test)
    adapted, logits = e2vpt(args, model, train, test)
    reloaded = reload(args, model, train, test)
    print_table([baseline, adapted])
    if not np.array_equal(logits, reloaded):
        sys.exit(f"The reloaded adapter predicts differently (by up to {np.abs(logits - reloaded).max():.2g}).")
    print(f"\nAdapter saved to {args.output_dir}, loaded into a fresh backbone: predictions identical.")
    return [baseline, adapted]


if __name__ == "__main__":
    main()
