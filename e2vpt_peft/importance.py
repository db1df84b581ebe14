"""How much a model would miss each visual prompt, and each segment of one."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import reduce
from peft.tuners.tuners_utils import set_adapter
from torch import nn
from torch.func import functional_call
from tqdm.auto import tqdm

from .attention import Prefix
from .layer import E2VPTLayer
from .masks import segment_mask, token_mask
from .modes import evaluating
from .non_finite import explain_non_finite
from .shards import refuse_shards

Batch = Mapping[str, Any]
Scores = tuple[torch.Tensor, torch.Tensor]
"""Of tokens, and of segments."""


@dataclass(frozen=True)
class PromptScores:
    """Scores of the visual prompts that an adapter has: the lowest are pruned first.

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
    adapter_name: Optional[str] = None,
    max_batches: Optional[int] = None,
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
            with
              respect to a factor on the token or segment.
            - `"signed"`: the score of the published code: the same mean without absolute values.
            - `"first_order"`: minus that: the first-order change of the loss on removal.
            - `"attention_gate"`: tokens by the absolute first-order change of the loss when they are no longer
            attended
              to; segments as with `"removal"`.
        adapter_name (`str`, *optional*): The adapter; the active one by default.
        max_batches (`int`, *optional*): Use at most so many batches of each process.
        progress_bar (`bool`): Whether to show one.

    Returns:
        [`PromptScores`]: To be given to [`prune_prompts`].

    Raises:
        ValueError: The method is unknown, a batch has no labels or gives no loss, or there is no batch.
        FloatingPointError: The loss is NaN or infinite; the message has the batch and the likely cause.

    Example:

        ```py
        >>> scores = score_prompts(model, dataloader)
        >>> scores.tokens.argsort()  # the first is pruned first
        ```
    """
    if method not in SCORING_METHODS:
        raise ValueError(f"method={method!r} must be one of {', '.join(map(repr, SCORING_METHODS))}.")
    name, layers = prompted_layers(model, adapter_name)
    config = layers[0].adapter_configs[name]
    shape = (int(token_mask(config).sum()), config.num_segments)
    tokens, segments = _mean_over_batches(
        model, layers, name, dataloader, SCORING_METHODS[method], shape, method, max_batches, progress_bar
    )
    return PromptScores(tokens, segments, method)


def score_prompts_by_layer(
    model: nn.Module,
    dataloader: Iterable[Any],
    *,
    adapter_name: Optional[str] = None,
    max_batches: Optional[int] = None,
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
    name, layers = prompted_layers(model, adapter_name)
    config = layers[0].adapter_configs[name]
    depth = sum(name in layer.e2vpt_visual_prompts for layer in layers)
    shape = (depth, int(token_mask(config).sum()), config.num_segments)
    tokens, segments = _mean_over_batches(
        model, layers, name, dataloader, _removal_by_layer, shape, "removal by layer", max_batches, progress_bar
    )
    return PromptScores(tokens, segments, "removal_by_layer")


def _mean_over_batches(
    model: nn.Module,
    layers: list[E2VPTLayer],
    name: str,
    dataloader: Iterable[Any],
    score: Callable[[_Probe], Scores],
    shape: tuple[int, ...],
    description: str,
    max_batches: Optional[int],
    progress_bar: bool,
) -> Scores:
    """The scores of tokens, (..., prompts), and of segments, of that shape, over the batches of all processes."""
    tokens = math.prod(shape[:-1])
    total = torch.zeros(tokens + math.prod(shape) + 1, dtype=torch.float64)
    cause = "The batch was one of another process."
    with _undisturbed(model, layers, name):
        total_batches = getattr(dataloader, "__len__", lambda: None)()
        shown = min(filter(None, (total_batches, max_batches)), default=None)
        progress = tqdm(dataloader, desc=f"Scoring prompts ({description})", total=shown, disable=not progress_bar)
        for number, batch in enumerate(progress):
            if max_batches is not None and number >= max_batches:
                break
            batch = _as_dict(model, batch)
            parts = score(_Probe(model, layers, name, batch))
            scores = torch.cat([*(part.flatten() for part in parts), torch.ones(1)]).detach().double().cpu()
            if total.isfinite().all() and not scores.isfinite().all():
                cause = f"It began with batch {number}. {explain_non_finite(model, batch)}"
            total += scores
    total = reduce(total.to(PartialState().device), reduction="sum").cpu()
    if total[-1] == 0:
        raise ValueError("dataloader gave no batch: there is nothing to score prompts on.")
    mean = total[:-1] / total[-1]
    if not mean.isfinite().all():
        raise FloatingPointError(f"The loss or its gradient is NaN or infinite: prompts cannot be scored. {cause}")
    return mean[:tokens].view(shape[:-1]), mean[tokens:].view(shape)


def prompted_layers(model: nn.Module, adapter_name: Optional[str] = None) -> tuple[str, list[E2VPTLayer]]:
    """The name of an adapter with visual prompts, by default the active one, and all its layers.

    Raises:
        ValueError: There is no such adapter, it has no visual prompts, several are active, or the model is in shards.
    """
    refuse_shards(model)
    layers = [module for module in model.modules() if isinstance(module, E2VPTLayer)]
    known = sorted({name for layer in layers for name in layer.adapter_configs})
    if adapter_name is None:
        active = sorted({name for layer in layers for name in layer.active_adapters if name in known})
        if len(active) != 1:
            raise ValueError(f"adapter_name is needed: the active E2VPT adapters are {active}, of {known}.")
        adapter_name = active[0]
    if adapter_name not in known:
        raise ValueError(f"adapter_name={adapter_name!r} is no E2VPT adapter of this model, which has {known}.")
    layers = [layer for layer in layers if adapter_name in layer.adapter_configs]
    if not layers[0].adapter_configs[adapter_name].num_visual_prompts:
        raise ValueError(f"Adapter '{adapter_name}' has no visual prompts: key-value prompts are not pruned.")
    return adapter_name, layers


class _Probe:
    """One batch and a model whose visual prompts can be replaced for a forward pass."""

    def __init__(self, model: nn.Module, layers: list[E2VPTLayer], adapter_name: str, batch: Batch) -> None:
        self.model = model
        self.adapter_name = adapter_name
        self.batch = batch
        self.layers = [layer for layer in layers if adapter_name in layer.e2vpt_visual_prompts]
        config = self.layers[0].adapter_configs[adapter_name]
        self.is_shallow = config.visual_prompt_depth == "shallow"
        self.segments = config.num_segments
        self.kept = segment_mask(config)[token_mask(config)]
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        parameters = [layer.e2vpt_visual_prompts[adapter_name] for layer in self.layers]
        self.names = [names[id(parameter)] for parameter in parameters]
        self.prompts = [layer.dense_visual_prompts(adapter_name).detach() for layer in self.layers]
        """Of each layer, (number of prompts, hidden size)."""

    def output(self, prompts: Optional[list[torch.Tensor]] = None) -> Any:
        """What the model returns, with other visual prompts in each layer if given."""
        replaced = dict(zip(self.names, self.prompts if prompts is None else prompts))
        return functional_call(self.model, replaced, args=(), kwargs=dict(self.batch))

    def loss(self, prompts: Optional[list[torch.Tensor]] = None) -> torch.Tensor:
        return self.loss_of(self.output(prompts))

    def loss_of(self, output: Any) -> torch.Tensor:
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if loss is None:
            raise ValueError(
                f"The model returns no loss for a batch of {sorted(self.batch)}: batches need labels, and the model a "
                "head that computes a loss."
            )
        return loss

    @torch.no_grad()
    def value(self, prompts: Optional[list[torch.Tensor]] = None) -> torch.Tensor:
        return self.loss(prompts).double().cpu()

    def without_segments(self, prompts: torch.Tensor) -> torch.Tensor:
        """(number of prompts, number of segments, hidden size): each prompt without each of its segments."""
        component = torch.arange(prompts.shape[-1], device=prompts.device) % self.segments
        others = component[None] != torch.arange(self.segments, device=prompts.device)[:, None]
        return prompts[:, None] * others


SCALES = (2.0**15, 2.0**10, 2.0**5, 1.0)
"""Powers of two, which change no digit; the first is the largest that float16 has."""


def _gradients(
    values: torch.Tensor, inputs: list[torch.Tensor], weights: Optional[torch.Tensor] = None
) -> list[torch.Tensor]:
    """The gradients of a weighted sum of values, in float64. They can be asked for again.

    The sum is scaled: float16 has no numbers below 6e-8, and of a model that is sure of its answers most gradients are
    smaller than that.
    """
    weights = torch.ones_like(values) if weights is None else weights
    for scale in SCALES:
        scaled = torch.autograd.grad(values, inputs, weights * scale, retain_graph=True)
        gradients = [gradient.double() / scale for gradient in scaled]
        if all(gradient.isfinite().all() for gradient in gradients):
            break  # otherwise the scaled ones may have been too large for float16
    return gradients


def _signed(probe: _Probe) -> Scores:
    """d loss / d mask, for masks of ones on tokens and on segments, shared by all layers."""
    leaves = [prompts.clone().requires_grad_() for prompts in probe.prompts]
    gradients = _gradients(probe.loss(leaves), leaves)
    segments = torch.zeros(probe.kept.shape, dtype=torch.float64)
    for gradient, prompts in zip(gradients, probe.prompts):  # whose hidden sizes may differ
        products = (gradient * prompts.double()).cpu()
        segments += products.unflatten(-1, (-1, probe.segments)).sum(-2)
    return segments.sum(-1), segments


def _absolute(probe: _Probe) -> Scores:
    tokens, segments = _signed(probe)
    return tokens.abs(), segments.abs()


def _first_order(probe: _Probe) -> Scores:
    tokens, segments = _signed(probe)
    return -tokens, -segments


def _tokens_left_out(probe: _Probe) -> torch.Tensor:
    """The change of the loss when one token is removed from all layers."""
    loss, count = probe.value(), len(probe.prompts[0])
    if count == 1:  # there is no model with fewer to compare with, and nothing to choose from
        return torch.zeros(1, dtype=torch.float64)
    others = [[index for index in range(count) if index != left_out] for left_out in range(count)]
    return torch.stack([probe.value([prompts[kept] for prompts in probe.prompts]) - loss for kept in others])


def _segments_left_out(probe: _Probe) -> torch.Tensor:
    """The change of the loss when one segment of one token is set to zero in all layers."""
    loss = probe.value()
    changes = torch.zeros(probe.kept.shape, dtype=torch.float64)
    for token, segment in probe.kept.nonzero().tolist():
        replaced = []
        for prompts in probe.prompts:
            prompts = prompts.clone()
            prompts[token, segment :: probe.segments] = 0
            replaced.append(prompts)
        changes[token, segment] = probe.value(replaced) - loss
    return changes


def _leave_one_out(probe: _Probe) -> Scores:
    return _tokens_left_out(probe), _segments_left_out(probe)


def _removal(probe: _Probe) -> Scores:
    return _tokens_left_out(probe), _segments_by_keys_and_values(probe)


def _removal_by_layer(probe: _Probe) -> Scores:
    """Changes of the loss when one token, and one segment of it, is missing in one layer."""
    loss = probe.value()
    tokens = torch.zeros(len(probe.prompts), len(probe.prompts[0]), dtype=torch.float64)
    for layer, token in np.ndindex(*tokens.shape):
        prompts = list(probe.prompts)
        prompts[layer] = torch.cat([prompts[layer][:token], prompts[layer][token + 1 :]])
        tokens[layer, token] = probe.value(prompts) - loss
    if probe.is_shallow:
        return tokens, _segments_by_midpoints(probe)[None]
    return tokens, _segments_of_layers(probe, together=False)


MOST_CLASSES = 10
"""Of so many classes, the likeliest for each sample, the logits are followed; those of the others hardly matter."""


def _segments_by_keys_and_values(probe: _Probe) -> torch.Tensor:
    """The change of the loss when one segment of one token is set to zero in all layers."""
    return _segments_by_midpoints(probe) if probe.is_shallow else _segments_of_layers(probe, together=True)[0]


def _segments_of_layers(probe: _Probe, together: bool) -> torch.Tensor:
    """The change of the loss when one segment of one token is set to zero, for deep prompts.

    Of shape (1, tokens, segments) for all layers together, or (layers, tokens, segments) for each by itself.

    What a prompt without a segment becomes in the norm and the projections is computed, not approximated: for that no
    image is needed. Only the way from there, from its keys and values to the logits, is taken as linear, for each
    sample by itself. At a minimum of the loss, where training ends, the derivative of the loss says little: there its
    curvature decides, which for a large part is that of the cross-entropy. Other losses are taken as linear, too.
    """
    prefixes: dict[E2VPTLayer, Prefix] = {}

    def record(layer: E2VPTLayer) -> Callable[[Prefix, int], Prefix]:
        def hook(prefix: Prefix, batch_size: int) -> Prefix:
            keys, values = (
                rows.detach().expand(batch_size, -1, -1, -1).clone().requires_grad_()
                for rows in (prefix.keys, prefix.values)
            )
            prefixes[layer] = Prefix(keys, values)
            return prefixes[layer]

        return hook

    with _prefix_hooks(probe.layers, record):
        output = probe.output()
    loss = probe.loss_of(output)
    rows = [rows for layer in probe.layers for rows in prefixes[layer][:2]]
    steps = _steps_without_segments(probe, prefixes)

    def changes(values: torch.Tensor, weights: Optional[torch.Tensor] = None, samples: int = 1) -> torch.Tensor:
        """Of the weighted sum of values, to first order, (layers or 1, samples, tokens, segments)."""
        gradients = _gradients(values, rows, weights)
        parts = [
            # Summed over the windows of a sample.
            torch.einsum("tshd,bthd->bts", step, gradient[:, : len(step)]).unflatten(0, (samples, -1)).sum(1)
            for step, gradient in zip(steps, gradients)
        ]
        keys_and_values = torch.stack(parts).unflatten(0, (-1, 2)).sum(1)
        return keys_and_values.sum(0, keepdim=True) if together else keys_and_values

    logits, labels = getattr(output, "logits", None), probe.batch.get("labels")
    if not _is_cross_entropy(loss, logits, labels):
        return changes(loss)[:, 0].cpu()
    assert logits is not None and labels is not None
    return _change_of_cross_entropy(logits, labels, changes).cpu()


@torch.no_grad()
def _steps_without_segments(probe: _Probe, prefixes: dict[E2VPTLayer, Prefix]) -> list[torch.Tensor]:
    """How far keys, and values, of each layer move without a segment: (tokens, segments, heads, head size) each."""
    count, steps = len(probe.kept), []
    for layer, prompts in zip(probe.layers, probe.prompts):
        without = layer.keys_and_values(probe.without_segments(prompts).flatten(0, 1))
        for new, old in zip(without, prefixes[layer][:2]):
            steps.append(new.unflatten(0, (count, probe.segments)).double() - old[0, :count, None].double())
    return steps


def _is_cross_entropy(loss: torch.Tensor, logits: Any, labels: Any) -> bool:
    """Whether a loss is the plain cross-entropy of one label for each sample."""
    if not isinstance(logits, torch.Tensor) or not isinstance(labels, torch.Tensor):
        return False
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or labels.is_floating_point() or (labels < 0).any():
        return False
    return torch.allclose(loss.double(), F.cross_entropy(logits.double(), labels), rtol=1e-3, atol=1e-6)


def _change_of_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    changes: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor],
) -> torch.Tensor:
    """The mean change of the cross-entropy, (..., tokens, segments), given the changes of weighted sums of logits."""
    likeliest = logits.topk(min(MOST_CLASSES, logits.shape[1])).indices
    has_own = (likeliest == labels[:, None]).any(-1)
    likeliest[~has_own, -1] = labels[~has_own]
    before = logits.detach().double()
    others = before.scatter(1, likeliest, -torch.inf).logsumexp(-1)[:, None, None]
    normaliser, own = others, before.new_zeros(())
    for classes in likeliest.T:
        weights = F.one_hot(classes, logits.shape[1]).to(logits.dtype)
        change = changes(logits, weights, len(logits))
        normaliser = torch.logaddexp(normaliser, before.gather(1, classes[:, None])[..., None] + change)
        own = own + change * (classes == labels)[:, None, None]
    return (normaliser - before.logsumexp(-1)[:, None, None] - own).mean(-3)


def _segments_by_midpoints(probe: _Probe) -> torch.Tensor:
    """The change of the loss by the derivative halfway, of all tokens at once, for each of the segments.

    Shallow prompts go through whole layers, of which nothing can be computed apart.
    """
    changes = torch.zeros(probe.kept.shape, dtype=torch.float64)
    for segment in range(probe.segments):
        halved = []
        for prompts in probe.prompts:
            prompts = prompts.clone()
            prompts[:, segment :: probe.segments] /= 2
            halved.append(prompts.requires_grad_())
        gradients = _gradients(probe.loss(halved), halved)
        for gradient, prompts in zip(gradients, probe.prompts):
            part = slice(segment, None, probe.segments)
            changes[:, segment] -= (gradient[:, part] * prompts[:, part].double()).sum(-1).cpu()
    return changes


def _attention_gate(probe: _Probe) -> Scores:
    """The derivative with respect to a bias on the attention that a token is paid, in all layers, heads and "
    "queries."""
    count = len(probe.prompts[0])
    bias = torch.zeros(count, device=probe.prompts[0].device, requires_grad=True)

    def gate(layer: E2VPTLayer) -> Callable[[Prefix, int], Prefix]:
        def hook(prefix: Prefix, batch_size: int) -> Prefix:
            others = bias.new_zeros(prefix.keys.shape[1] - count)
            return Prefix(prefix.keys, prefix.values, torch.cat([bias, others])[None])

        return hook

    if probe.is_shallow:
        with _token_bias(probe.layers, bias):
            loss = probe.loss()
    else:
        with _prefix_hooks(probe.layers, gate):
            loss = probe.loss()
    (gradient,) = _gradients(loss, [bias])
    return gradient.cpu().abs(), _segments_by_keys_and_values(probe)


SCORING_METHODS: dict[str, Callable[[_Probe], Scores]] = {
    "removal": _removal,
    "leave_one_out": _leave_one_out,
    "absolute": _absolute,
    "signed": _signed,
    "first_order": _first_order,
    "attention_gate": _attention_gate,
}
"""The scores of tokens and segments on one batch, by the name of the method."""


@contextmanager
def _prefix_hooks(
    layers: list[E2VPTLayer], make: Callable[[E2VPTLayer], Callable[[Prefix, int], Prefix]]
) -> Iterator[None]:
    for layer in layers:
        layer.prefix_hook = make(layer)
    try:
        yield
    finally:
        for layer in layers:
            layer.prefix_hook = None


@contextmanager
def _token_bias(layers: list[E2VPTLayer], bias: torch.Tensor) -> Iterator[None]:
    for layer in layers:
        layer.token_bias = bias
    try:
        yield
    finally:
        for layer in layers:
            layer.token_bias = None


@contextmanager
def _undisturbed(model: nn.Module, layers: list[E2VPTLayer], adapter_name: str) -> Iterator[None]:
    """With the adapter active and the model in eval mode; leaves both, and the random state, as they were."""
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    active = list(layers[0].active_adapters)
    states = (random.getstate(), np.random.get_state(), torch.get_rng_state())
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        set_adapter(model, adapter_name)
        with evaluating(model), torch.enable_grad():
            yield
    finally:
        if active != [adapter_name]:
            set_adapter(model, active)
        for parameter, requires_grad in trainable.items():
            parameter.requires_grad_(requires_grad)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if devices:
            torch.cuda.set_rng_state_all(devices)


def _as_dict(model: nn.Module, batch: Any) -> dict[str, Any]:
    """A batch as keyword arguments of the model, on its device."""
    if not isinstance(batch, Mapping):
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise ValueError(
                f"A batch must be a dictionary with labels, or a pair (inputs, labels), not {type(batch).__name__}."
            )
        main_input = getattr(model, "main_input_name", "pixel_values")
        batch = {main_input: batch[0], "labels": batch[1]}
    device = next(model.parameters()).device
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
