"""A task that a tiny model learns in seconds: the class of an image is the place of its bright patch."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch.utils.data import Dataset
from transformers import TrainingArguments
from transformers.trainer_utils import EvalPrediction

from e2vpt_peft import E2VPTConfig, E2VPTTrainer, PruningConfig
from e2vpt_peft.adapter import PromptedAdapter
from e2vpt_peft.pruning import AdapterSnapshot

from ..support.models import tiny_vit

PROMPTS, SEGMENTS = 4, 4


class BrightPatch(Dataset):
    def __init__(self, size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(0, 5, (size,), generator=generator)
        self.images = torch.randn(size, 3, 16, 16, generator=generator) * 0.3
        for image, label in zip(self.images, self.labels.tolist()):
            image[:, 4 * (label // 4) : 4 * (label // 4) + 4, 4 * (label % 4) : 4 * (label % 4) + 4] += 2

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


TRAIN, VALIDATION = BrightPatch(32, seed=1), BrightPatch(24, seed=2)


def adapted(seed: int = 0, **config: Any) -> PeftModel:
    torch.manual_seed(seed)
    defaults: dict[str, Any] = {
        "num_visual_prompts": PROMPTS,
        "num_kv_prompts": 2,
        "num_segments": SEGMENTS,
        "modules_to_save": ["classifier"],
    }
    return get_peft_model(tiny_vit(num_hidden_layers=2), E2VPTConfig(**{**defaults, **config}))  # type: ignore


def taken(model: PeftModel) -> dict[str, torch.Tensor]:
    """A snapshot of the model's adapter, as tensors."""
    return AdapterSnapshot.of(PromptedAdapter.find(model)).to_tensors()


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def arguments(output_dir: Any, **options: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_strategy": "no",
    }
    return TrainingArguments(str(output_dir), **{**defaults, **options})


def pruning(**options: Any) -> PruningConfig:
    defaults: dict[str, Any] = {"token_rates": [0.25, 0.5], "segment_rates": [0.0, 0.5]}
    return PruningConfig(**{**defaults, **options})


def make_trainer(output_dir: Any, model: Any = None, config: PruningConfig | None = None, **options: Any) -> Any:
    keywords = {name: options.pop(name) for name in list(options) if name in TRAINER_KEYWORDS}
    return E2VPTTrainer(
        **{
            "model": adapted() if model is None else model,
            "args": arguments(output_dir, **options),
            "train_dataset": TRAIN,
            "eval_dataset": VALIDATION,
            "compute_metrics": accuracy,
            "pruning_config": pruning() if config is None else config,
            **keywords,
        }
    )


TRAINER_KEYWORDS = (
    "train_dataset",
    "eval_dataset",
    "compute_metrics",
    "callbacks",
    "final_train_dataset",
    "optimizers",
    "optimizer_cls_and_kwargs",
)
