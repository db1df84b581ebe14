"""One batch and an adapted model, to be asked what the loss would be with other prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import set_adapter
from torch import nn
from torch.func import functional_call

from ..adapter import PromptedAdapter
from ..utils.modes import evaluating
from ..utils.randomness import random_state_kept

Prompts = Sequence[torch.Tensor]
"""Visual prompts by layer, each (number of prompts, hidden size)."""


class Probe:
    """One batch and a model whose visual prompts can be replaced for a forward pass.

    Args:
        adapter ([`PromptedAdapter`]): The adapter.
        batch (`Mapping[str, Any]`): The inputs of the model, with labels.

    Attributes:
        layers (`list[E2VPTLayer]`): The layers that have visual prompts.
        running (`Callable`): A context of other forward passes of the model, see [`Passes`].
        prompts (`list[torch.Tensor]`): Those of each layer, without pruned ones, (number of prompts, hidden size).
        kept (`torch.Tensor`): Which of their segments are kept, bool, (number of prompts, number of segments).
    """

    def __init__(self, adapter: PromptedAdapter, batch: Mapping[str, Any]) -> None:
        self.model = adapter.model
        self.batch = batch
        self.layers = adapter.visual_layers
        self.running = adapter.passes.running
        self.is_shallow = adapter.is_shallow
        self.segments = adapter.config.num_segments
        self.kept = adapter.masks.kept_segments
        self.prompts = [layer.kept_prompts(adapter.name).detach() for layer in self.layers]
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        parameters = [layer.e2vpt_visual_prompts[adapter.name] for layer in self.layers]
        self._names = [names[id(parameter)] for parameter in parameters]

    def output(self, prompts: Prompts | None = None) -> Any:
        """What the model returns, with other visual prompts in each layer if given.

        They take the place of the parameters, in their dense form and in any number.
        """
        replaced = dict(zip(self._names, self.prompts if prompts is None else prompts))
        return functional_call(self.model, replaced, args=(), kwargs=dict(self.batch))

    def loss(self, prompts: Prompts | None = None) -> torch.Tensor:
        """The loss, with other visual prompts in each layer if given."""
        return self.loss_in(self.output(prompts))

    def loss_in(self, output: Any) -> torch.Tensor:
        """The loss that the model has returned.

        Raises:
            ValueError: It has returned none.
        """
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if not isinstance(loss, torch.Tensor):
            raise ValueError(
                f"The model returns no loss for a batch of {sorted(self.batch)}: batches need labels, and the model a "
                "head that computes a loss."
            )
        return loss

    @torch.no_grad()
    def value(self, prompts: Prompts | None = None) -> torch.Tensor:
        """The loss as a number, float64, ()."""
        return self.loss(prompts).double().cpu()


@contextmanager
def undisturbed(adapter: PromptedAdapter) -> Iterator[None]:
    """With the adapter active and the model in eval mode; leaves both, and the random state, as they were."""
    model = adapter.model
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    active = list(adapter.layers[0].active_adapters)
    try:
        set_adapter(model, adapter.name)
        with random_state_kept(), evaluating(model), torch.enable_grad():
            yield
    finally:
        if active != [adapter.name]:
            set_adapter(model, active)
        for parameter, requires_grad in trainable.items():
            parameter.requires_grad_(requires_grad)


def as_inputs(model: nn.Module, batch: Any) -> dict[str, Any]:
    """A batch as keyword arguments of the model, on its device.

    Raises:
        ValueError: It is neither a dictionary nor a pair (inputs, labels).
    """
    if not isinstance(batch, Mapping):
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise ValueError(
                f"A batch must be a dictionary with labels, or a pair (inputs, labels), not {type(batch).__name__}."
            )
        main_input = getattr(model, "main_input_name", "pixel_values")
        batch = {main_input: batch[0], "labels": batch[1]}
    device = next(model.parameters()).device
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
