"""The code of a model card."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import PreTrainedModel

from ..adapter import PromptedAdapter
from .readme import is_hub_id

TASKS_WITH_LABELS = (
    "audio-classification",
    "image-classification",
    "image-segmentation",
    "object-detection",
    "text-classification",
    "token-classification",
    "video-classification",
)
MOST_LABELS = 20
"""With more classes than that, the code has their number in place of their names."""


def usage(
    adapter: PromptedAdapter,
    adapter_id: str,
    base_model: str | None,
    processor_id: str | None,
    task: str | None,
) -> str:
    """Python code that loads backbone and adapter, and classifies an image if that is the task.

    Folders of this machine are `path/to/` and their name, whoever reads the card has others.
    """
    backbone = adapter.backbone
    is_from_transformers = type(backbone).__module__.startswith("transformers.")
    classifies_images = task == "image-classification" and isinstance(backbone, PreTrainedModel)
    processor = processor_id or base_model
    folder = "" if adapter.name == "default" else f", subfolder={_text(adapter.name)}"
    names = [*(["AutoImageProcessor"] if classifies_images else []), type(backbone).__name__]
    lines = ["import e2vpt_peft  # registers the method with PEFT"]
    lines += ["import torch"] if classifies_images else []
    lines += ["from peft import PeftModel"]
    lines += ["from PIL import Image"] if classifies_images else []
    if is_from_transformers:
        lines += [f"from transformers import {', '.join(names)}", ""]
        arguments = [_location(base_model), *_backbone_options(adapter, task)]
        lines += [f"backbone = {_call(f'{type(backbone).__name__}.from_pretrained', arguments)}"]
    else:
        lines += ["", f"backbone = ...  # your own {type(backbone).__name__}, with its pretrained weights"]
    lines += [f"model = PeftModel.from_pretrained(backbone, {_location(adapter_id)}{folder}).eval()"]
    if classifies_images:
        lines += [
            "",
            f"processor = AutoImageProcessor.from_pretrained({_location(processor)})",
            'image = e2vpt_peft.to_rgb(Image.open("image.png"))  # your image',
            "with torch.no_grad():",
            '    logits = model(**processor(image, return_tensors="pt")).logits',
            "print(backbone.config.id2label[logits.argmax().item()])",
        ]
    return "\n".join(lines) + "\n"


def _backbone_options(adapter: PromptedAdapter, task: str | None) -> list[str]:
    backbone = adapter.backbone
    options = [f"revision={_text(adapter.config.revision)}"] if adapter.config.revision else []
    if isinstance(backbone, PreTrainedModel) and task in TASKS_WITH_LABELS and adapter.trained_modules:
        labels = backbone.config.id2label or {}
        has_names = labels != {index: f"LABEL_{index}" for index in range(len(labels))}
        if has_names and len(labels) <= MOST_LABELS:
            names = ", ".join(f"{index}: {_text(name)}" for index, name in labels.items())
            options.append(f"id2label={{{names}}}")
        else:
            options.append(f"num_labels={len(labels)}")
        options.append("ignore_mismatched_sizes=True")  # the adapter has its own head
    return options


def _location(name: str | None) -> str:
    """A Hub id as it is, a folder without the part of its path that is this machine's."""
    if name is None:
        return _text("path/to/the/backbone")
    return _text(name if is_hub_id(name) else f"path/to/{Path(name).resolve().name}")


def _call(function: str, arguments: list[str]) -> str:
    one_line = f"{function}({', '.join(arguments)})"
    if len(one_line) < 100:
        return one_line
    return f"{function}(\n" + "".join(f"    {argument},\n" for argument in arguments) + ")"


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)
