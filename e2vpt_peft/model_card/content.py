"""The text and the metadata of a model card."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from huggingface_hub import EvalResult, ModelCardData
from transformers import PreTrainedModel
from transformers.modelcard import TASK_TAG_TO_NAME_MAPPING

from ..adapter import PromptedAdapter
from ..masks import PromptMasks
from ..version import __version__
from .details import CardDetails
from .facts import count_all_parameters, find_base_model, find_task
from .readme import is_hub_id
from .snippet import usage

PAPER = "https://huggingface.co/papers/2307.13770"
NO_RESULTS = ("epoch", "step", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
"""What Trainer returns along with the results."""


class CardContent:
    """What the card of an adapter says.

    Args:
        adapter ([`PromptedAdapter`]): The adapter, from which much can be seen.
        details ([`CardDetails`]): What cannot.
    """

    def __init__(self, adapter: PromptedAdapter, details: CardDetails) -> None:
        self.adapter, self.details = adapter, details
        found = details.base_model or find_base_model(adapter)
        # Of anything else than an id on the Hub, the card says at most the name of a folder that is there: a path is
        # nobody's business, and in an adapter that somebody else has made it may be any text.
        self.base_model = found if is_hub_id(found) else None
        self.backbone_folder = local_name(found)
        self.task = details.task or find_task(adapter.backbone)
        self.adapter_id = details.adapter_id or "path/to/the/adapter"
        self.name = details.name or Path(self.adapter_id).resolve().name
        self.dataset_folder = local_name(details.dataset)
        self.dataset = details.dataset if self.dataset_folder is None else None

    def metadata(self) -> ModelCardData:
        tags = ["e2vpt", *(self.details.tags or [])]
        if self.task is not None:
            tags.append(self.task)
        if isinstance(self.adapter.backbone, PreTrainedModel):
            tags.append("transformers")
        if self.base_model is not None:
            tags.append(f"base_model:adapter:{self.base_model}")
        return ModelCardData(
            base_model=self.base_model,
            datasets=[self.dataset] if is_hub_id(self.dataset) else None,
            language=self.details.language,
            library_name="peft",
            license=self.details.license,
            pipeline_tag=self.task,
            tags=sorted(set(tags)),
            model_name=self.name,
            eval_results=self._eval_results() or None,
        )

    def text(self) -> str:
        sections = [
            self._introduction(),
            self._use(),
            self._prompts(),
            self._pruning(),
            self._results(),
            self._training(),
            self._versions(),
        ]
        return "\n".join(section for section in sections if section)

    @cached_property
    def results(self) -> dict[tuple[str, str], float]:
        """Values by split and name."""
        splits = {"eval_": self.details.eval_split, "test_": "test", "": ""}
        found = {}
        for key, value in (self.details.metrics or {}).items():
            prefix = next(prefix for prefix in splits if key.startswith(prefix))
            name = key.removeprefix(prefix)
            if name not in NO_RESULTS:
                found[splits[prefix], name] = float(value)
        return found

    def _introduction(self) -> str:
        backbone = _name(self.base_model, self.backbone_folder) or "a vision transformer"
        dataset = _name(self.dataset, self.dataset_folder, "datasets/")
        text = f"# {self.name}\n\nAn [E²VPT]({PAPER}) adapter for {backbone}"
        text += f", trained on {dataset}" if dataset else ""
        trained = ["visual prompts"] if self.adapter.config.num_visual_prompts else []
        trained += ["key-value prompts"] if self.adapter.config.num_kv_prompts else []
        trained += [f"`{name}`" for name in self.adapter.trained_modules]
        return f"{text}. The backbone is frozen; trained are {_enumerate(trained)}.\n"

    def _use(self) -> str:
        base_model = self.details.base_model or self.base_model
        code = usage(self.adapter, self.adapter_id, base_model, self.details.processor_id, self.task)
        return f"## Use\n\n```python\n{code}```\n"

    def _prompts(self) -> str:
        adapter, rows = self.adapter, []
        config, masks = adapter.config, adapter.masks
        if config.num_visual_prompts:
            where = "per layer (deep)" if config.visual_prompt_depth == "deep" else "before the first layer (shallow)"
            rows.append(("visual prompts", f"{_kept(masks.tokens)} {where}"))
            rows.append(("segments of visual prompts", _kept(masks.segments)))
        if config.num_kv_prompts:
            sharing = "the same for keys and values" if config.share_kv_prompts else "keys and values apart"
            beside = ", read by GELU beside the attention" if config.kv_prompt_activation else ""
            rows.append(("key-value prompts", f"{config.num_kv_prompts} per head and layer, {sharing}{beside}"))
        rows.append(("adapted layers", f"{len(adapter.layers)}"))
        prompts, total = adapter.num_parameters(), count_all_parameters(adapter.model)
        modules = {
            name: sum(parameter.numel() for parameter in module.parameters())
            for name, module in adapter.trained_modules.items()
        }
        trainable = prompts + sum(modules.values())
        rows.append(("trainable parameters", f"{trainable:,} ({trainable / total:.2%} of {total:,})"))
        rows.append(("of these, prompts", f"{prompts:,}"))
        rows += [(f"of these, `{name}`", f"{size:,}") for name, size in modules.items()]
        return "## Prompts\n\n" + _table(["", ""], rows)

    def _pruning(self) -> str:
        adapter, unpruned = self.adapter, PromptMasks.unpruned(self.adapter.config)
        if adapter.masks == unpruned and self.details.pruning is None:
            return ""
        before, after = (
            (masks.num_tokens, masks.num_segments, adapter.num_parameters(masks))
            for masks in (unpruned, adapter.masks)
        )
        labels = ("visual prompts", "segments of visual prompts", "parameters of prompts")
        rows = [(label, f"{old:,}", f"{new:,}") for label, old, new in zip(labels, before, after)]
        text = "## Pruning\n\n" + _table(["", "before", "after"], rows)
        return text + (f"\n{self.details.pruning}\n" if self.details.pruning else "")

    def _results(self) -> str:
        rows = [(name.replace("_", " "), split, f"{value:.4g}") for (split, name), value in self.results.items()]
        if not rows:
            return ""
        return "## Results\n\n" + _table(["metric", "data", "value"], rows)

    def _training(self) -> str:
        if not self.details.arguments:
            return ""
        lines = [f"- {name}: {value}\n" for name, value in self.details.arguments.items()]
        return "## Training\n\n" + "".join(lines)

    def _versions(self) -> str:
        # In the form in which PEFT looks for its version, so that it does not add it once more.
        versions = [f"PEFT {peft.__version__}", f"e2vpt_peft {__version__}"]
        versions += [f"Transformers {transformers.__version__}", f"PyTorch {torch.__version__}"]
        return "### Framework versions\n\n" + "".join(f"- {version}\n" for version in versions)

    def _eval_results(self) -> list[EvalResult]:
        """The results as the Hub shows them, which wants task and data set with each, and the latter by its id."""
        if self.task is None or self.dataset is None:
            return []
        return [
            EvalResult(
                task_type=self.task,
                task_name=TASK_TAG_TO_NAME_MAPPING.get(self.task),
                dataset_type=self.dataset,
                dataset_name=self.dataset,
                dataset_config=self.details.dataset_config,
                dataset_split=split or None,
                metric_type=name,
                metric_name=name.replace("_", " ").capitalize(),
                metric_value=value,
            )
            for (split, name), value in self.results.items()
        ]


def local_name(path: str | None) -> str | None:
    """The name of a folder or file on this machine, without where it is, or `None` if there is no such."""
    try:
        return Path(path).resolve().name if path is not None and Path(path).exists() else None
    except (OSError, ValueError):  # longer than a path can be, or with characters that none has
        return None


def _name(hub_id: str | None, folder: str | None, kind: str = "") -> str | None:
    """A link, if there is something to link to, or a name as it stands."""
    if is_hub_id(hub_id):
        return f"[{hub_id}](https://huggingface.co/{kind}{hub_id})"
    name = folder or hub_id
    return None if name is None else f"`{' '.join(name.replace('`', '').split())}`"


def _kept(mask: torch.Tensor) -> str:
    kept, number = int(mask.sum()), mask.numel()
    return f"{kept:,}" if kept == number else f"{kept:,} of {number:,}"


def _enumerate(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _table(head: list[str], rows: list[Any]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
