"""By how much the loss rises when one segment of a visual prompt is set to zero, without trying each of them.

Deep prompts
------------
Let `p` be a prompt of one layer and `p_s` the same prompt with segment `s` at zero. All that the model sees of a
prompt are its keys and values in that layer, so that the removal is a step of these rows,

    step(s) = (k(p_s) - k(p), v(p_s) - v(p)),        k = key projection of the norm, v = value projection of the norm.

No image is needed for that, and it is computed, not approximated: a norm sees no scale, so that the derivative at `p`
would say little of a step as large as a segment.

From there to the logits `f` of a sample the model is taken as linear, at one backward pass for each class `c`:

    change_c(s) = sum over layers of <gradient of f_c by the rows, step(s)>.

The cross-entropy of the sample, with label `y`, is then exact again:

    rise(s) = log sum_c exp(f_c + change_c(s)) - log sum_c exp(f_c) - change_y(s).

That matters at a minimum of the loss, where training ends: the derivative of the loss itself says little there, and
its curvature, most of which is that of the cross-entropy, decides. Of many classes only the likeliest of each sample
are followed; the logits of the others are taken as fixed. Other losses are taken as linear, too.

Shallow prompts
---------------
They go through whole layers, of which nothing can be computed apart. The rise is the derivative of the loss halfway
between `p` and `p_s`, times the step, for all prompts at once and one segment after the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..attention.prefix import Prefix
from ..layer import E2VPTLayer
from .gradients import gradients_of
from .probe import Probe

MOST_CLASSES = 10
"""Of so many classes, the likeliest for each sample, the logits are followed; those of the others hardly matter."""


def rise_without_segments(probe: Probe) -> torch.Tensor:
    """The rise of the loss when one segment of one prompt is zero in all layers, float64, (prompts, segments)."""
    return _rise_at_midpoints(probe) if probe.is_shallow else _rise_of_deep_prompts(probe, by_layer=False)[0]


def rise_without_segments_by_layer(probe: Probe) -> torch.Tensor:
    """The same when it is zero in one layer only, (layers, prompts, segments). Shallow prompts have one layer."""
    return _rise_at_midpoints(probe)[None] if probe.is_shallow else _rise_of_deep_prompts(probe, by_layer=True)


def _rise_of_deep_prompts(probe: Probe, by_layer: bool) -> torch.Tensor:
    """(layers, prompts, segments), or (1, prompts, segments) for all layers together."""
    prefixes: dict[E2VPTLayer, Prefix] = {}

    def record(layer: E2VPTLayer, prefix: Prefix, batch_size: int) -> Prefix:
        keys, values = (
            rows.detach().expand(batch_size, -1, -1, -1).clone().requires_grad_()
            for rows in (prefix.keys, prefix.values)
        )
        prefixes[layer] = prefix._replace(keys=keys, values=values)
        return prefixes[layer]

    with probe.running(edit_prefix=record):
        output = probe.output()
    loss, logits, labels = probe.loss_in(output), getattr(output, "logits", None), probe.batch.get("labels")
    model = _LinearModel(
        rows=[rows for layer in probe.layers for rows in prefixes[layer][:2]],
        steps=_steps_without_segments(probe, prefixes),
        by_layer=by_layer,
    )
    if not _is_cross_entropy(loss, logits, labels):
        return model.changes(loss, samples=1)[:, 0].cpu()
    assert logits is not None and labels is not None
    return _rise_of_cross_entropy(logits, labels, model).cpu()


@dataclass(frozen=True)
class _LinearModel:
    """The model between the rows of its prefixes and its outputs, to first order.

    Attributes:
        rows (`list[torch.Tensor]`):
            Keys and values of each layer in turn, (samples times windows, prefix length, heads, head size), with the
            graph of the forward pass behind them.
        steps (`list[torch.Tensor]`): How far each of them moves, (prompts, segments, heads, head size).
        by_layer (`bool`): Whether one layer moves at a time, or all of them.
    """

    rows: list[torch.Tensor]
    steps: list[torch.Tensor]
    by_layer: bool

    def changes(self, values: torch.Tensor, samples: int, weights: torch.Tensor | None = None) -> torch.Tensor:
        """The change of a weighted sum of outputs without each segment, sample by sample.

        A sample's outputs depend on its own rows only, so that one backward pass of the sum over samples gives the
        gradient of each.

        Args:
            values (`torch.Tensor`): Outputs of the model.
            samples (`int`): How many samples they are of; 1 for a number of the whole batch.
            weights (`torch.Tensor`, *optional*): Of the shape of the values.

        Returns:
            `torch.Tensor`: (layers, or 1 for all of them, samples, prompts, segments), float64.
        """
        parts = []
        for step, gradient in zip(self.steps, gradients_of(values, self.rows, weights)):
            # Visual prompts are the first rows of a prefix, and the windows of a sample are neighbours in the batch.
            by_window = torch.einsum("pshd,bphd->bps", step, gradient[:, : len(step)])
            parts.append(by_window.unflatten(0, (samples, -1)).sum(1))
        by_layer = torch.stack([keys + values for keys, values in zip(parts[::2], parts[1::2])])
        return by_layer if self.by_layer else by_layer.sum(0, keepdim=True)


@torch.no_grad()
def _steps_without_segments(probe: Probe, prefixes: dict[E2VPTLayer, Prefix]) -> list[torch.Tensor]:
    """How far keys, and values, of each layer move without a segment: (prompts, segments, heads, head size) each."""
    count, steps = len(probe.kept), []
    for layer, prompts in zip(probe.layers, probe.prompts):
        component = torch.arange(prompts.shape[-1], device=prompts.device) % probe.segments
        others = component[None] != torch.arange(probe.segments, device=prompts.device)[:, None]
        without = layer.project_prompts((prompts[:, None] * others).flatten(0, 1))
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


def _rise_of_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, model: _LinearModel) -> torch.Tensor:
    """The mean rise over the samples, (layers or 1, prompts, segments)."""
    likeliest = logits.topk(min(MOST_CLASSES, logits.shape[1])).indices
    has_own = (likeliest == labels[:, None]).any(-1)
    likeliest[~has_own, -1] = labels[~has_own]
    before = logits.detach().double()
    # The sum over the classes begins with those that are not followed.
    after = before.scatter(1, likeliest, -torch.inf).logsumexp(-1)[:, None, None]
    own = before.new_zeros(())
    for classes in likeliest.T:
        weights = F.one_hot(classes, logits.shape[1]).to(logits.dtype)
        change = model.changes(logits, len(logits), weights)
        after = torch.logaddexp(after, before.gather(1, classes[:, None])[..., None] + change)
        own = own + change * (classes == labels)[:, None, None]
    return (after - before.logsumexp(-1)[:, None, None] - own).mean(-3)


def _rise_at_midpoints(probe: Probe) -> torch.Tensor:
    """For shallow prompts, (prompts, segments)."""
    rises = torch.zeros(probe.kept.shape, dtype=torch.float64)
    for segment in range(probe.segments):
        halved = []
        for prompts in probe.prompts:
            prompts = prompts.clone()
            prompts[:, segment :: probe.segments] /= 2
            halved.append(prompts.requires_grad_())
        gradients = gradients_of(probe.loss(halved), halved)
        for gradient, prompts in zip(gradients, probe.prompts):
            part = slice(segment, None, probe.segments)
            rises[:, segment] -= (gradient[:, part] * prompts[:, part].double()).sum(-1).cpu()
    return rises
