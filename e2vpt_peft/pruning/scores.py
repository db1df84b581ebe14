"""How much a model would miss each visual prompt, and each segment of one."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import nn
from tqdm.auto import tqdm

from ..adapter import PromptedAdapter
from ..utils.fields import check_choice
from ..utils.non_finite import explain_non_finite
from ..utils.shards import refuse_shards
from .methods import SCORING_METHODS, Method, TokensAndSegments, removal_by_layer
from .probe import Probe, as_inputs, undisturbed


@dataclass(frozen=True)
class PromptScores:
    """Scores of the visual prompts that an adapter has: the lowest are pruned first.

    Scores of your own may be `-inf` for what is to go first and `inf` for what is to go last. NaN is refused when it
    comes to pruning, where something is kept that it would rank.

    Attributes:
        tokens (`torch.Tensor`): One score per visual prompt, float64, (number of visual prompts,).
        segments (`torch.Tensor`): One score per segment, float64, (number of visual prompts, number of segments).
        method (`str`): How they were made, one of [`SCORING_METHODS`].
    """

    tokens: torch.Tensor
    segments: torch.Tensor
    method: str = ""


def score_prompts(
    model: nn.Module,
    dataloader: Iterable[Any],
    method: str = "removal",
    *,
    adapter_name: str | None = None,
    max_batches: int | None = None,
    progress_bar: bool = True,
) -> PromptScores:
    """Score each visual prompt, and each segment of it, by what the loss on some data says about it.

    The model, its gradients, its mode and the random state are left as they were. With several processes, each gives
    its part of the data and all get the same scores. The mixed precision in force is used: call it under
    `accelerator.autocast()` for that of an [`~accelerate.Accelerator`].

    Args:
        model (`nn.Module`): The adapted model.
        dataloader (`Iterable`): Batches, as dictionaries with labels, or as pairs (inputs, labels).
        method (`str`):
            - `"removal"` (default): tokens are left out one at a time, which costs a forward pass for each; segments
              get the change of the loss by the keys and values that are left without them, computed exactly in the
              norm and the projections and, if it is the cross-entropy of a classifier, in the loss; only the network
              in between is taken as linear. That takes one forward pass, and a backward pass for each class, at most
              ten.
            - `"leave_one_out"`: tokens and segments are left out one at a time: exact, at a forward pass for each.
            - `"absolute"`: the paper's score (eq. 6): the mean over batches of the absolute derivative of the loss
              with respect to a factor on the token or segment.
            - `"signed"`: the score of the published code: the same mean without absolute values.
            - `"first_order"`: minus that: the first-order change of the loss on removal.
            - `"attention_gate"`: tokens by the absolute first-order change of the loss when they are no longer
              attended to; segments as with `"removal"`. Not with flash and flex attention.
        adapter_name (`str`, *optional*): The adapter; the active one by default.
        max_batches (`int`, *optional*): Use at most so many batches of each process.
        progress_bar (`bool`): Whether to show one.

    Returns:
        [`PromptScores`]: To be given to [`prune_prompts`].

    Raises:
        ValueError:
            The method is unknown or cannot be had with this attention implementation, the model is in shards, a batch
            has no labels or gives no loss, or there is no batch.
        FloatingPointError: The loss is NaN or infinite; the message has the batch and the likely cause.

    Example:

        ```py
        >>> scores = score_prompts(model, dataloader)
        >>> scores.tokens.argsort()  # the first is pruned first
        ```
    """
    check_choice("method", method, list(SCORING_METHODS))
    adapter = find_prunable(model, adapter_name)
    shape = (adapter.masks.num_tokens, adapter.config.num_segments)
    scoring = _Scoring(adapter, SCORING_METHODS[method], shape, method)
    return PromptScores(*scoring.mean(dataloader, max_batches, progress_bar), method)


def score_prompts_by_layer(
    model: nn.Module,
    dataloader: Iterable[Any],
    *,
    adapter_name: str | None = None,
    max_batches: int | None = None,
    progress_bar: bool = True,
) -> PromptScores:
    """Score each visual prompt, and each segment of it, in each layer by itself: to look at, not to prune by.

    Prompts are pruned in all layers at once, by the scores of [`score_prompts`]. These tell in which layers they
    matter. They need not add up to those: layers make up for each other.

    - Tokens: by how much the loss rises when the token is left out of that one layer. Exact, at a forward pass for
      each token of each layer.
    - Segments: as `score_prompts(..., "removal")` does, when the segment is zero in that one layer.

    Args:
        model (`nn.Module`): The adapted model.
        dataloader (`Iterable`): As for [`score_prompts`].
        adapter_name (`str`, *optional*): The adapter; the active one by default.
        max_batches (`int`, *optional*): Use at most so many batches of each process.
        progress_bar (`bool`): Whether to show one.

    Returns:
        [`PromptScores`]: With one more dimension in front, layers: `tokens` (layers, number of visual prompts) and
        `segments` (layers, number of visual prompts, number of segments). Shallow prompts have one layer.

    Raises:
        ValueError, FloatingPointError: As for [`score_prompts`].

    Example:

        ```py
        >>> from e2vpt_peft.plots import plot_importance

        >>> plot_importance(model, score_prompts_by_layer(model, dataloader)).savefig("importance.png")
        ```
    """
    adapter = find_prunable(model, adapter_name)
    shape = (len(adapter.visual_layers), adapter.masks.num_tokens, adapter.config.num_segments)
    scoring = _Scoring(adapter, removal_by_layer, shape, "removal by layer")
    return PromptScores(*scoring.mean(dataloader, max_batches, progress_bar), "removal_by_layer")


def find_prunable(model: nn.Module, adapter_name: str | None = None) -> PromptedAdapter:
    """Find an adapter that can be scored, pruned and rewound.

    Raises:
        ValueError: There is no such adapter, it has no visual prompts or is offloaded, or the model is in shards.
    """
    refuse_shards(model)
    adapter = PromptedAdapter.find(model, adapter_name)
    adapter.require_visual_prompts()
    adapter.require_values()
    return adapter


@dataclass(frozen=True)
class _Scoring:
    """The scores of an adapter, over batches and processes.

    Attributes:
        adapter ([`PromptedAdapter`]): The adapter.
        method (`Callable`): Scores one batch.
        shape (`tuple[int, ...]`): That of the scores of segments; those of tokens have all dimensions but the last.
        description (`str`): What the progress bar calls the method.
    """

    adapter: PromptedAdapter
    method: Method
    shape: tuple[int, ...]
    description: str

    def mean(self, dataloader: Iterable[Any], max_batches: int | None, progress_bar: bool) -> TokensAndSegments:
        """The mean of the scores over the batches of all processes."""
        num_tokens = math.prod(self.shape[:-1])
        total = torch.zeros(num_tokens + math.prod(self.shape) + 1, dtype=torch.float64)  # and the number of batches
        cause = "The batch was one of another process."
        with undisturbed(self.adapter):
            shown = min(filter(None, (_length(dataloader), max_batches)), default=None)
            description = f"Scoring prompts ({self.description})"
            for number, batch in enumerate(tqdm(dataloader, description, total=shown, disable=not progress_bar)):
                if max_batches is not None and number >= max_batches:
                    break
                inputs = as_inputs(self.adapter.model, batch)
                parts = self.method(Probe(self.adapter, inputs))
                scores = torch.cat([*(part.flatten() for part in parts), torch.ones(1)]).detach().double().cpu()
                if total.isfinite().all() and not scores.isfinite().all():
                    cause = f"It began with batch {number}. {explain_non_finite(self.adapter.model, inputs)}"
                total += scores
        total = reduce(total.to(PartialState().device), reduction="sum").cpu()
        if total[-1] == 0:
            raise ValueError("dataloader gave no batch: there is nothing to score prompts on.")
        mean = total[:-1] / total[-1]
        if not mean.isfinite().all():
            raise FloatingPointError(f"The loss or its gradient is NaN or infinite: prompts cannot be scored. {cause}")
        return mean[:num_tokens].view(self.shape[:-1]), mean[num_tokens:].view(self.shape)


def _length(dataloader: Any) -> int | None:
    """The number of batches, if it is known: a DataLoader of an iterable data set has a length that raises."""
    try:
        return len(dataloader)
    except TypeError:
        return None
