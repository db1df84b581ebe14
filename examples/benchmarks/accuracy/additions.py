"""What was tried on top of key-value prompts beside the attention: as methods, or as other training steps.

They reach into prompts as no option of the package does: none gained enough to become one. Steps are of an attention
whose queries come from a `q_proj`, as those of transformers' ViT and DINOv2 do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn

from e2vpt_peft import E2VPTLayer
from e2vpt_peft.attention.prefix import KeysAndValues
from e2vpt_peft.initialization import KEY_STD

from .methods import ALL_BESIDE, Method, Pruning, add_prompts, e2vpt
from .recipes import Rates
from .steps import EagerStep, autocast
from .tasks import Task

NOISE = 0.5
"""Standard deviation of the noise in the first layer; it falls linearly to none."""
CONSISTENCY = 0.1
"""Weight of the squared distance between the logits of two passes."""
DAMPING = 0.01
"""Added to the second moments of queries, in parts of their mean."""
MOVE_EVERY, MOVES, MOVED = 25, 12, 4
"""After so many steps, so many times, so many prompts change their layer."""


@dataclass(frozen=True)
class Addition:
    """One of them: what is trained, by which step, and what is pruned then, before all is trained again."""

    method: Method
    step: Callable[[PeftModel, torch.optim.Optimizer, str], EagerStep] = EagerStep
    rates: Rates | None = None


def prompted(model: nn.Module) -> list[E2VPTLayer]:
    """The adapted attentions, from the first layer on."""
    return [module for module in model.modules() if isinstance(module, E2VPTLayer)]


def prompts_of(layer: E2VPTLayer) -> nn.Parameter:
    """The key-value prompts of the only adapter, (2, 1, heads, number, head size)."""
    (prompts,) = layer.e2vpt_kv_prompts.values()
    return prompts


def add_prompts_and_scales(model: Any, task: Task, **options: Any) -> nn.Module:
    """Prompts, and learned scales on the sequence's keys and values, as (IA)³ has them.

    `k = s_k * W_k x`, `v = s_v * W_v x`: (hidden size,) each, one at the start.
    """
    adapted = add_prompts(model, task, **options)
    for layer in prompted(adapted):
        for name in (layer.site.key_projection, layer.site.value_projection):
            projection = layer.base_layer.get_submodule(name)
            projection.register_parameter("scale", nn.Parameter(torch.ones(projection.out_features)))
            projection.register_forward_hook(lambda module, inputs, output: output * module.scale.to(output.dtype))
    return adapted


class StepAfterALook(EagerStep):
    """A step that sees what a projection of each attention gives for the first batch, before it trains on that."""

    projection = "q_proj"

    def __init__(self, model: PeftModel, optimizer: torch.optim.Optimizer, precision: str) -> None:
        super().__init__(model, optimizer, precision)
        self.begun = False

    @torch.no_grad()
    def look(self, pixels: torch.Tensor) -> None:
        layers = prompted(self.model)
        seen: list[torch.Tensor] = []
        hooks = [
            layer.base_layer.get_submodule(self.projection).register_forward_hook(
                lambda module, inputs, output: seen.append(output.detach().flatten(0, 1).float())
            )
            for layer in layers
        ]
        with autocast(pixels.device, self.precision):
            self.model(pixel_values=pixels)
        for hook in hooks:
            hook.remove()
        for layer, states in zip(layers, seen):
            self.begin(layer, states.unflatten(-1, (layer.site.num_heads, layer.site.head_size)))

    def begin(self, layer: E2VPTLayer, states: torch.Tensor) -> None:
        """Do what is to be done with one layer. States are (tokens of all images, heads, head size)."""
        raise NotImplementedError

    def __call__(self, pixels: torch.Tensor, labels: torch.Tensor) -> None:
        if not self.begun:
            self.look(pixels)
            self.begun = True
        super().__call__(pixels, labels)


class FromImages(StepAfterALook):
    """Key prompts start as keys of image tokens, drawn from the first batch, at the length that they usually have."""

    projection = "k_proj"

    def begin(self, layer: E2VPTLayer, states: torch.Tensor) -> None:
        keys = prompts_of(layer)[0, 0]
        heads, number, size = keys.shape
        generator = torch.Generator().manual_seed(0)  # its own, so that images come in the same order as without
        chosen = states[torch.randperm(len(states), generator=generator)[:number]].transpose(0, 1)
        keys.copy_(F.normalize(chosen, dim=-1) * KEY_STD * size**0.5)


class Whitened(StepAfterALook):
    """What is trained are prompts in coordinates in which queries are white, after BPT (arXiv 2506.22908).

    `K = Z W` with `W = c (C + eps I)^(-1/2)`, for each head: `C` (head size, head size) are the second moments of its
    queries over the first batch, and `c` keeps the mean square of `q K^T` as it is. `W` is not trained.
    """

    def begin(self, layer: E2VPTLayer, states: torch.Tensor) -> None:
        size = layer.site.head_size
        moments = torch.einsum("thd,the->hde", states, states) / len(states)
        total = moments.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
        values, vectors = torch.linalg.eigh(moments + DAMPING * total / size * torch.eye(size, device=states.device))
        white = vectors * values.rsqrt()[:, None] @ vectors.mT
        white *= (total / (white @ moments @ white).diagonal(dim1=1, dim2=2).sum(1)[:, None, None]).sqrt()
        plain = layer._kv_prompts

        def whitened(adapter_name: str, samples: int) -> KeysAndValues:
            keys, values = plain(adapter_name, samples)
            return torch.einsum("snhd,hde->snhe", keys, white.to(keys.dtype)), values

        layer._kv_prompts = whitened


class Noisy(EagerStep):
    """Each sample's value prompts are multiplied by noise, `1 + s e` for each component, shared by tokens.

    The noise of PACE (arXiv 2409.17137) on what prompts give.
    """

    def __init__(self, model: PeftModel, optimizer: torch.optim.Optimizer, precision: str) -> None:
        super().__init__(model, optimizer, precision)
        layers = prompted(model)
        for depth, layer in enumerate(layers):
            self.add_noise(layer, NOISE * (1 - depth / len(layers)))

    def add_noise(self, layer: E2VPTLayer, deviation: float) -> None:
        plain = layer._kv_prompts

        def noisy(adapter_name: str, samples: int) -> KeysAndValues:
            keys, values = plain(adapter_name, samples)
            if layer.training:
                values = values * (1 + deviation * torch.randn_like(values[:, :1]))
            return keys, values

        layer._kv_prompts = noisy
        layer._samples = lambda batch_size, dropout: batch_size if layer.training else 1


class Consistent(Noisy):
    """Two passes with other noise have to agree: PACE itself."""

    def __call__(self, pixels: torch.Tensor, labels: torch.Tensor) -> None:
        with autocast(labels.device, self.precision):
            logits = self.model(pixel_values=torch.cat([pixels, pixels])).logits.float()
        one, other = logits.chunk(2)
        loss = F.cross_entropy(logits, torch.cat([labels, labels]))
        (loss + CONSISTENCY * (one - other).square().sum(1).mean()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class Moved(EagerStep):
    """Prompts move to the layers that gain by them, after PRO-VPT (arXiv 2503.06901).

    Half of each layer's prompts are idle at the start: their values are zero and stay so. From time to time, those
    prompts by whose removal the loss would fall most, to first order (`g v`, summed over the steps since the last
    time), become idle. As many start anew, one each in the layers whose prompts are worth most by the same score.
    PRO-VPT has a policy that is learned in place of that choice.
    """

    def __init__(self, model: PeftModel, optimizer: torch.optim.Optimizer, precision: str) -> None:
        super().__init__(model, optimizer, precision)
        self.prompts = [prompts_of(layer) for layer in prompted(model)]
        number = self.prompts[0].shape[-2]
        device = self.prompts[0].device
        self.active = (torch.arange(number, device=device) < number // 2).repeat(len(self.prompts), 1)
        self.scores = torch.zeros(self.active.shape, device=device)
        self.steps = 0

    def __call__(self, pixels: torch.Tensor, labels: torch.Tensor) -> None:
        with autocast(labels.device, self.precision):
            logits = self.model(pixel_values=pixels).logits
        F.cross_entropy(logits.float(), labels).backward()
        for prompts, active, scores in zip(self.prompts, self.active, self.scores):
            assert prompts.grad is not None
            scores += (prompts.grad[1] * prompts.detach()[1]).sum((0, 1, 3))
            prompts.grad[..., ~active, :] = 0
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        if self.steps % MOVE_EVERY == 0 and self.steps <= MOVES * MOVE_EVERY:
            self.move()

    @torch.no_grad()
    def move(self) -> None:
        worth = (self.scores * self.active).sum(1) / self.active.sum(1).clamp(min=1)
        worth[self.active.all(1)] = torch.inf  # there is no room
        moved = min(MOVED, len(worth))
        losers = self.scores.masked_fill(~self.active, -torch.inf).flatten().topk(moved).indices
        for loser, layer in zip(losers.tolist(), worth.topk(moved, largest=False).indices.tolist()):
            self.reset(*divmod(loser, self.active.shape[1]), active=False)
            idle = int((~self.active[layer]).nonzero()[0])
            self.reset(layer, idle, active=True)
        self.scores.zero_()

    def reset(self, layer: int, prompt: int, active: bool) -> None:
        """Start one prompt anew: with a value of zero, so that nothing changes yet."""
        parameter = self.prompts[layer]
        key, value = parameter[..., prompt, :]
        key.normal_(std=KEY_STD)
        value.zero_()
        for state in self.optimizer.state[parameter].values():
            if state.shape == parameter.shape:
                state[..., prompt, :] = 0
        self.active[layer, prompt] = active


def beside(
    name: str, visual: int = 0, number: int = 16, pruning: Pruning | None = None, dropout: float = 0.0
) -> Method:
    """Prompts beside the attention, and visual prompts."""
    options = {**ALL_BESIDE, "num_visual_prompts": visual, "num_kv_prompts": number, "kv_prompt_dropout": dropout}
    return e2vpt(name, pruning, learning_rate=1e-2, kv_lr_ratio=1, **options)


SCALED = Method("scales", 1e-2, partial(add_prompts_and_scales, **ALL_BESIDE), kv_lr_ratio=1)

ADDITIONS = (
    Addition(beside("16 + 8", 16, 8)),
    Addition(beside("48 + 8, pruned to 16 + 8", 48, 8, Pruning(segments=False, images=200)), rates=(2 / 3, 0.0)),
    Addition(beside("8 + 12", 8, 12)),
    Addition(beside("0 + 16")),
    Addition(beside("0 + 32", number=32)),
    Addition(SCALED),
    Addition(beside("from images"), FromImages),
    Addition(beside("whitened"), Whitened),
    Addition(beside("dropout 0.1", dropout=0.1)),
    Addition(beside("noise"), Noisy),
    Addition(beside("consistency"), Consistent),
    Addition(beside("moved", number=32), Moved),
)
"""Visual prompts and key-value prompts beside the attention; then, what was tried on 0 + 16."""
