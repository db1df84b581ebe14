"""Deep visual prompts as real tokens, for any model whose layers take (batch size, length, hidden size).

Raw prompts are put in front of what enters a layer and taken off what leaves it, so that they pass the layer's own
norms, projections, attention and MLP. Nothing of the package is used here.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


@contextmanager
def inserted(layers: Sequence[nn.Module], prompts: Sequence[torch.Tensor]) -> Iterator[None]:
    """With `prompts` as tokens.

    Args:
        layers: The layers of a transformer.
        prompts: One tensor (tokens, hidden size) for each layer, which live for that layer only (VPT-Deep), or a
            single one, which live from the first layer to the last (VPT-Shallow).
    """
    handles: list[Any] = []
    for index, layer in enumerate(layers):
        if len(prompts) == 1:
            handles += _insert(layer, prompts[0], adds=index == 0, strips=index == len(layers) - 1)
        else:
            handles += _insert(layer, prompts[index])
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _insert(layer: nn.Module, tokens: torch.Tensor, adds: bool = True, strips: bool = True) -> list[Any]:
    count = len(tokens)
    signature = inspect.signature(inspect.unwrap(type(layer).forward))

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = signature.bind(module, *args, **kwargs)
        states_name = list(signature.parameters)[1]
        states = call.arguments[states_name]
        length = states.shape[1] - (0 if adds else count)
        if adds:
            call.arguments[states_name] = torch.cat([tokens.expand(len(states), -1, -1), states], 1)
        for given in (call.arguments, call.arguments.get("kwargs", {})):
            mask = given.get("attention_mask")
            if mask is not None:
                mask = F.pad(mask, (count, 0), value=True if mask.dtype == torch.bool else 0.0)
                if mask.shape[-2] > 1:  # the tokens see what the first token sees
                    mask = torch.cat([mask[..., :1, :].expand(*mask.shape[:-2], count, -1), mask], -2)
                given["attention_mask"] = mask
            if given.get("position_embeddings") is not None:
                cos, sin = given["position_embeddings"]
                if cos.shape[-2] == length:
                    given["position_embeddings"] = (
                        F.pad(cos, (0, 0, count, 0), value=1.0),
                        F.pad(sin, (0, 0, count, 0)),
                    )
        if "position_mask" in signature.parameters:  # V-JEPA 2: at position 0 nothing is rotated
            call.arguments["position_mask"] = F.pad(torch.arange(length), (count, 0)).expand(len(states), -1)
        return call.args[1:], call.kwargs

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return (output[0][:, count:], *output[1:]) if isinstance(output, tuple) else output[:, count:]

    def no_bias(module: nn.Module, args: tuple[Any, ...], bias: torch.Tensor) -> torch.Tensor:
        return F.pad(bias, (count, 0, count, 0))

    return [
        layer.register_forward_pre_hook(enter, with_kwargs=True),
        *([layer.register_forward_hook(leave, prepend=True)] if strips else []),
        *(
            part.register_forward_hook(no_bias)
            for part in layer.modules()
            if type(part).__name__.endswith("RelativePositionBias")
        ),
    ]
