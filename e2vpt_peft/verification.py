"""Does the prefix do, in a given model, what inserted tokens would do? For architectures the package does not know."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .adapter import PromptedAdapter
from .attention.prefix import Prefix
from .layer import E2VPTLayer
from .utils.modes import evaluating

MASKS = ("attention_mask", "attn_mask")
POSITION_EMBEDDINGS = ("position_embeddings",)
POSITIONS = ("position_mask",)  # at 0 nothing is rotated


@torch.no_grad()
def check_prefix(model: nn.Module, inputs: Mapping[str, Any], *, tolerance: float = 1e-4) -> float:
    """Compare the prefix of an adapted model with visual prompts that are inserted as tokens.

    Both are the same if the package has understood the attention. For a model that it does not know, this function
    checks in two forward passes that it has found the norm in front of the attention (or that there is none), and that
    the outputs are those of a model whose attention is given the normed visual prompts as real tokens.

    Args:
        model (`nn.Module`): The adapted model, with one active adapter, of deep visual prompts. It is left as it was.
        inputs (`Mapping[str, Any]`): Inputs of the model, as for `model(**inputs)`. Take some with a padding mask.
        tolerance (`float`, defaults to `1e-4`): The largest difference allowed, of outputs of size 1.

    Returns:
        `float`: The largest difference between outputs, relative to the largest output, or absolute if that is below
        1.

    Raises:
        ValueError: The outputs differ, or the norm is another one, or the attention takes no other tokens (SegFormer
            makes an image of them), so that there is nothing to compare with.

    Example:

        ```py
        >>> model = get_peft_model(my_model, E2VPTConfig(target_modules=["attn"], attention_norm="ln_1"))
        >>> check_prefix(model, {"pixel_values": torch.randn(2, 3, 224, 224)})
        ```
    """
    adapter = PromptedAdapter.find(model)
    adapter.require_visual_prompts()
    if adapter.is_shallow:
        raise ValueError(f"Adapter '{adapter.name}' has shallow visual prompts, which are inserted tokens anyway.")
    names = [name for name, module in model.named_modules() if module in adapter.layers]
    with evaluating(model):
        with _all(_norm_checked(model, name) for name in names):
            outputs = _outputs(model, inputs)
        expected = _outputs_with_tokens(model, inputs, adapter)
    difference = max(
        float((actual - wanted).abs().max() / wanted.abs().max().clamp(min=1))
        for actual, wanted in zip(outputs, expected)
    )
    if not difference <= tolerance:
        raise ValueError(
            f"With a prefix, outputs differ by {difference:.2g} from those with inserted tokens: the attention does "
            "something to its keys that the package does not know, for example a position that is applied inside. "
            "Key-value prompts alone (num_visual_prompts=0) can still be used."
        )
    return difference


def _outputs_with_tokens(model: nn.Module, inputs: Mapping[str, Any], adapter: PromptedAdapter) -> list[torch.Tensor]:
    """What the model gives if visual prompts are tokens in each attention, in place of a prefix."""
    tokens_inserted = (_tokens_inserted(layer, adapter.name) for layer in adapter.layers)
    no_visual_prompts = partial(_without_visual_prompts, adapter.masks.num_tokens)
    try:
        with adapter.passes.running(edit_prefix=no_visual_prompts), _all(tokens_inserted):
            return _outputs(model, inputs)
    except Exception as error:  # whatever the code of a model does with tokens that it does not expect
        attention = type(adapter.layers[0].base_layer).__name__
        raise ValueError(
            f"check_prefix cannot judge this model: {attention} takes no tokens beside its own, so there is nothing "
            f"to compare with ({type(error).__name__}: {error}). This says nothing about the prefix itself."
        ) from error


def _outputs(model: nn.Module, inputs: Mapping[str, Any]) -> list[torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)  # some models mask tokens at random
        output = model(**inputs)
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else [output]
    return [value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()]


@contextmanager
def _all(contexts: Iterator[Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


@contextmanager
def _norm_checked(model: nn.Module, name: str) -> Iterator[None]:
    """For a forward pass in which what enters the attention has to be what its norm gave."""
    layer: Any = model.get_submodule(name)
    site, seen = layer.site, []
    norm = site.norm

    def see(module: nn.Module, args: tuple[Any, ...], output: Any = None) -> None:
        seen.append(args[0] if output is None else output)

    if norm is not None:
        what = f"what its norm '{site.norm_name}' gives"
        handle = norm.register_forward_hook(see)
    else:
        what = "what enters its layer, though attention_norm='none'"
        handle = _layer_around(model, name).register_forward_pre_hook(see)

    def enter(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound, states_name = _bind(attention, args, kwargs)
        if not seen or not _same_rows(seen[0], bound.arguments[states_name]):
            raise ValueError(
                f"What enters the attention '{name}' is not {what}: set attention_norm to the name of the norm in "
                "front of the attention, or to 'none' if there is none."
            )

    handles = [handle, layer.base_layer.register_forward_pre_hook(enter, with_kwargs=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _layer_around(model: nn.Module, name: str) -> nn.Module:
    """The transformer layer that an attention is in: the innermost module around it that has a number for a name."""
    path = name.split(".")
    depth = next((depth for depth in range(len(path) - 1, 0, -1) if path[depth].isdigit()), len(path) - 2)
    return model.get_submodule(".".join(path[: depth + 1]))


def _same_rows(states: torch.Tensor, others: torch.Tensor) -> bool:
    """Whether two tensors have the same tokens, in any order, as if cut into windows; zeros (padding) are ignored."""
    direction = torch.cos(1e3 * torch.linspace(1, 2, states.shape[-1], device=states.device, dtype=torch.float64))
    first, second = ((rows.double() @ direction).flatten().sort().values for rows in (states, others))
    first, second = first[first != 0], second[second != 0]
    return first.shape == second.shape and torch.allclose(first, second, rtol=1e-4, atol=1e-4)


@contextmanager
def _tokens_inserted(layer: E2VPTLayer, adapter_name: str) -> Iterator[None]:
    """For a forward pass in which an attention is given visual prompts as tokens."""
    prompts = layer.kept_prompts(adapter_name)
    count = len(prompts)

    def enter(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bound, states_name = _bind(attention, args, kwargs)
        states = bound.arguments[states_name]
        tokens = layer.site.normalize(prompts, states.dtype).to(states.dtype).expand(len(states), -1, -1)
        bound.arguments[states_name] = torch.cat([tokens, states], 1)
        for inputs in (bound.arguments, bound.arguments.get("kwargs", {})):
            for name in MASKS:
                if inputs.get(name) is not None:
                    inputs[name] = _more_tokens(inputs[name], count, states.shape[1])
            for name in POSITION_EMBEDDINGS:
                if inputs.get(name) is not None:
                    inputs[name] = _more_positions(inputs[name], count, states.shape[1])
        for name in bound.signature.parameters.keys() & set(POSITIONS):
            positions = bound.arguments.get(name)
            if positions is None:
                positions = torch.arange(states.shape[1], device=states.device).expand(len(states), -1)
            bound.arguments[name] = F.pad(positions, (count, 0))
        return bound.args[1:], bound.kwargs

    def leave(attention: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return (output[0][:, count:], *output[1:]) if isinstance(output, tuple) else output[:, count:]

    def no_bias(module: nn.Module, args: tuple[Any, ...], bias: torch.Tensor) -> torch.Tensor:
        return F.pad(bias, (count, 0, count, 0))

    biases = [part for part in layer.base_layer.modules() if type(part).__name__.endswith("RelativePositionBias")]
    handles = [
        layer.base_layer.register_forward_pre_hook(enter, with_kwargs=True),
        layer.base_layer.register_forward_hook(leave),
        *(part.register_forward_hook(no_bias) for part in biases),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _without_visual_prompts(count: int, layer: E2VPTLayer, prefix: Prefix, batch_size: int) -> Prefix:
    return prefix._replace(keys=prefix.keys[:, count:], values=prefix.values[:, count:])


def _bind(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[inspect.BoundArguments, str]:
    """The arguments of a call of an attention, `self` included, and the name of the first, the hidden states."""
    signature = inspect.signature(inspect.unwrap(type(attention).forward))
    return signature.bind(attention, *args, **kwargs), list(signature.parameters)[1]


def _more_positions(positions: Any, count: int, length: int) -> Any:
    """The position embeddings of `count` more tokens in front, which are at no position."""
    if isinstance(positions, torch.Tensor):  # added to queries and keys
        return F.pad(positions, (0, 0, count, 0))
    cos, sin = positions  # a rotation; one of fewer tokens leaves those in front alone
    if cos.shape[-2] != length:
        return positions
    return F.pad(cos, (0, 0, count, 0), value=1.0), F.pad(sin, (0, 0, count, 0))


def _more_tokens(mask: torch.Tensor, count: int, length: int) -> torch.Tensor:
    """An attention mask for `count` more tokens in front, to which and from which everything is visible."""
    rows = count if mask.dim() > 2 and mask.shape[-2] == length else 0
    return F.pad(mask, (count, 0, rows, 0) if rows else (count, 0), value=0 if mask.is_floating_point() else 1)
