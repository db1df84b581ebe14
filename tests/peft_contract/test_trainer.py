"""Plain `transformers.Trainer` with plain arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import EvalPrediction, Trainer, TrainingArguments

from ..support.models import images, prompt_parameters, tiny_deit, tiny_dinov2, tiny_vit
from .common import DEEP, SHALLOW, adapted, logits, small_config

kinds = pytest.mark.parametrize("kind", [DEEP, SHALLOW], ids=["deep", "shallow"])
SAMPLES = 12


def arguments(folder: Path, **values: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "max_steps": 6,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(str(folder), **{**defaults, **values})


def task() -> datasets.Dataset:
    """Random images with a column that no model knows, which Trainer has to drop by itself."""
    features = datasets.Features(
        pixel_values=datasets.Array3D((3, 16, 16), "float32"),
        labels=datasets.Value("int64"),
        file=datasets.Value("string"),
    )
    columns = {
        "pixel_values": images(SAMPLES).numpy(),
        "labels": [index % 5 for index in range(SAMPLES)],
        "file": [str(index) for index in range(SAMPLES)],
    }
    return datasets.Dataset.from_dict(columns, features).with_format("torch")


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


def trainable(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


@pytest.mark.parametrize("make", [tiny_vit, tiny_deit, tiny_dinov2])
def test_evaluation_has_loss_and_metrics_without_extra_arguments(make: Any, tmp_path: Path) -> None:
    """Trainer has to look through PeftModel, whose forward names no labels."""
    trainer = Trainer(adapted(make()), arguments(tmp_path), eval_dataset=task(), compute_metrics=accuracy)
    assert trainer.label_names == ["labels"]
    metrics = trainer.evaluate()
    assert {"eval_loss", "eval_accuracy"} <= metrics.keys()
    prediction = trainer.predict(task())
    assert prediction.predictions.shape == (SAMPLES, 5)
    assert prediction.label_ids.tolist() == task()["labels"][:].tolist()
    assert {"test_loss", "test_accuracy"} <= prediction.metrics.keys()


def test_a_natively_adapted_model_too(tmp_path: Path) -> None:
    model = tiny_vit()
    model.add_adapter(small_config())
    trainer = Trainer(model, arguments(tmp_path), train_dataset=task(), eval_dataset=task(), compute_metrics=accuracy)
    trainer.train()
    assert {"eval_loss", "eval_accuracy"} <= trainer.evaluate().keys()


def test_a_loaded_adapter_too(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path / "adapter")
    trainer = Trainer(loaded, arguments(tmp_path), eval_dataset=task(), compute_metrics=accuracy)
    metrics = trainer.evaluate()
    labels = torch.tensor([index % 5 for index in range(SAMPLES)])
    with torch.no_grad():
        expected = model(images(SAMPLES), labels=labels).loss
    assert metrics["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


@kinds
def test_training_changes_prompts_and_modules_to_save_and_nothing_else(kind: dict, tmp_path: Path) -> None:
    model = adapted(**kind)
    model.add_adapter("idle", small_config(**kind))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    training = trainable(model)
    assert set(prompt_parameters(model)) - training.keys() == {
        name for name in prompt_parameters(model) if name.endswith(".idle")
    }
    trainer = Trainer(model, arguments(tmp_path), train_dataset=task())
    loss = trainer.train().training_loss
    assert np.isfinite(loss)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != (name in training), name
    assert sum(value.numel() for value in training.values()) == model.get_nb_trainable_parameters()[0]


def test_training_learns(tmp_path: Path) -> None:
    trainer = Trainer(adapted(prompt_dropout=0.0), arguments(tmp_path, max_steps=12), train_dataset=task())
    before = trainer.evaluate(task())["eval_loss"]
    trainer.train()
    assert trainer.evaluate(task())["eval_loss"] < before / 2


@kinds
def test_a_resumed_run_ends_in_the_weights_of_an_uninterrupted_one(kind: dict, tmp_path: Path) -> None:
    """With dropout, momentum and a schedule, all of which have to be resumed as well."""

    def trainer(folder: Path) -> Trainer:
        torch.manual_seed(3)
        model = adapted(prompt_dropout=0.3, kv_prompt_dropout=0.2, **kind)
        values = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5, "lr_scheduler_type": "cosine"}
        return Trainer(model, arguments(folder, **values), train_dataset=task())

    straight = trainer(tmp_path / "straight")
    straight.train()
    resumed = trainer(tmp_path / "resumed")
    start = trainable(resumed.model)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))  # in the middle of an epoch
    assert resumed.state.global_step == straight.state.global_step == 5
    after, expected = trainable(resumed.model), trainable(straight.model)
    assert after.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(after[name], value, atol=1e-7, rtol=0)
        assert not torch.equal(value, start[name])


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    model = adapted()
    calls: list[int] = []

    def second_is_best(prediction: EvalPrediction) -> dict[str, float]:
        calls.append(1)
        return {"score": float(len(calls) == 2)}

    values = {
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "score",
        "greater_is_better": True,
    }
    trainer = Trainer(
        model, arguments(tmp_path, **values), train_dataset=task(), eval_dataset=task(), compute_metrics=second_is_best
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    best = PeftModel.from_pretrained(tiny_vit(), tmp_path / "checkpoint-4")
    last = PeftModel.from_pretrained(tiny_vit(), tmp_path / "checkpoint-6")
    model.eval()
    assert torch.equal(logits(model), logits(best))
    assert not torch.equal(logits(model), logits(last))


def test_the_best_loss_needs_no_extra_arguments(tmp_path: Path) -> None:
    values = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    trainer = Trainer(adapted(), arguments(tmp_path, **values), train_dataset=task(), eval_dataset=task())
    trainer.train()
    assert trainer.state.best_model_checkpoint is not None


def test_a_checkpoint_is_a_small_adapter(tmp_path: Path) -> None:
    trainer = Trainer(adapted(), arguments(tmp_path), train_dataset=task())
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    files = {path.name for path in (tmp_path / "final").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} <= files
    assert "model.safetensors" not in files
    loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path / "final")
    trainer.model.eval()
    assert torch.equal(logits(loaded), logits(trainer.model))
