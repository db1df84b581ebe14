"""What is timed: a forward pass, a training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Call = Callable[[], Any]


def inference(
    model: nn.Module, images: torch.Tensor, forward: Callable[..., Any] | None = None, **kwargs: Any
) -> Call:
    """A forward pass as users run it: evaluation mode, `torch.inference_mode`.

    Args:
        model (`nn.Module`): The model.
        images (`torch.Tensor`): A batch.
        forward (`Callable`, *optional*): What runs in place of the model, such as the compiled one.
        **kwargs: What the forward pass is given beside the images.
    """
    model.eval()
    run = model if forward is None else forward

    @torch.inference_mode()
    def call() -> torch.Tensor:
        return run(pixel_values=images, **kwargs).logits

    return call


def compiled(model: nn.Module, toy: bool, **options: Any) -> Callable[..., Any]:
    """The compiled model; with toys, by a backend that takes no time."""
    if toy:
        return torch.compile(model, backend="eager")
    return torch.compile(model, dynamic=False, **options)


class TrainingStep:
    """Forward, loss, backward and AdamW on all that is trainable.

    Args:
        model (`nn.Module`): What is trained.
        images, labels (`torch.Tensor`): A batch.
        forward (`Callable`, *optional*): What runs in place of the model, such as the compiled one.
        looks_at_loss (`bool`): Whether each step waits to see that the loss is finite, as `E2VPTTrainer` does.
        **optimizer: Options of AdamW, such as `fused`.
    """

    def __init__(
        self,
        model: nn.Module,
        images: torch.Tensor,
        labels: torch.Tensor,
        forward: Callable[..., Any] | None = None,
        looks_at_loss: bool = False,
        **optimizer: Any,
    ) -> None:
        self.images, self.labels, self.looks_at_loss = images, labels, looks_at_loss
        self.forward = model if forward is None else forward
        model.train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, **optimizer)

    def __call__(self) -> None:
        loss = F.cross_entropy(self.forward(pixel_values=self.images).logits.float(), self.labels)
        loss.backward()
        if self.looks_at_loss and not loss.isfinite():
            raise FloatingPointError(f"The loss is {loss.item()}.")
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def state(self) -> list[torch.Tensor]:
        """The tensors of the optimiser."""
        return [value for values in self.optimizer.state.values() for value in values.values()]
