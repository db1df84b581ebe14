"""Different adapters in one batch: whose names may be given, how many, and heads that each sample has of its own
adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from .attention.prefix import WayIn
from .attention.tokens import stack_name
from .route import BASE_MODEL, Route
from .running_pass import Passes
from .utils.stand_in import StandIn

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


class RoutedModulesToSave(ModulesToSaveWrapper):
    """PEFT's wrapper of one of the `modules_to_save`, which sends each sample through its own adapter's copy.

    PEFT tells its wrapper the adapter names by a hook that it registers for every call: threads that share a model
    would see each other's hooks, and `torch.compile` cannot trace it. PEFT's wrapper also ignores the names if the
    active adapter has no copy, and does not know adapters without one. This class reads the running route instead.
    Samples of `"__base__"`, and of adapters that have no copy, go through the original module, as they do alone.
    """

    passes: Passes
    name: str
    """Its name in the model, for errors."""
    is_in_block: bool
    """Whether it is in a block of an adapted tower, where samples have been counted, and may be cut into windows."""

    def module_for(self, adapter_name: str) -> nn.Module:
        """The copy that the running pass sends the samples of an adapter through."""
        names = [adapter_name]
        if self.passes.current.route is None:  # all go through that of the first adapter, as ever in PEFT
            names = self.active_adapters if all(name in self._adapters for name in self.active_adapters) else []
        copies: nn.ModuleDict = self.modules_to_save
        original: nn.Module = self.original_module
        return original if self.disable_adapters or not names or names[0] not in copies else copies[names[0]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        route = self.passes.current.route
        if route is None or self.disable_adapters:
            return super().forward(*args, **kwargs)
        if len(args) != 1 or kwargs or not isinstance(args[0], torch.Tensor):
            raise TypeError(
                f"adapter_names cannot divide the input of {type(self.original_module).__name__}, one of the "
                "modules_to_save, among the adapters: only modules that take a single tensor can be in "
                "modules_to_save then. Run the adapters one after the other."
            )
        if not self.is_in_block:
            route.check(args[0].shape[0], self.name)
        if not route.adapters:  # no samples
            return self.original_module(*args)
        copies = self.modules_to_save
        modules = [
            copies[name] if name in copies else self.original_module  # noqa: SIM401  (a ModuleDict has no get)
            for name in route.adapters
        ]
        if args[0].dim() == 2 and _are_alike(modules):
            biases = None if modules[0].bias is None else [module.bias for module in modules]
            return route.dispatch_linear(args[0], [module.weight for module in modules], biases)
        return route.dispatch(args[0], modules)


def _are_alike(modules: Sequence[nn.Module]) -> TypeGuard[Sequence[nn.Linear]]:
    """Whether modules are linear layers of the same size, and nobody notices that they are not called."""
    first = modules[0]
    return all(
        type(module) is nn.Linear
        and "forward" not in vars(module)
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and module.weight.shape == first.weight.shape
        and module.weight.dtype == first.weight.dtype
        and (module.bias is None) == (first.bias is None)
        for module in modules
    )


class SampleCount(WayIn):
    """Counts the samples of a routed batch where they enter the first adapted block of a stack, before they are cut
    into windows. Not at each block: torch takes a slower way through a module that has hooks.

    Args:
        stack ([`BlockStack`]): The stack.
        model (`nn.Module`, *optional*): The model, to be kept from calls with names that nobody reads.
    """

    def __init__(self, stack: BlockStack, model: nn.Module | None = None) -> None:
        self.block, self.name, self.stack, self.model = stack.block, stack.block_name, stack.name, model
        self.handles: list[RemovableHandle] = []

    def attach(self, attention: nn.Module, source: Any) -> None:
        self.source = source
        if self.model is not None:
            self.handles.append(self.model.register_forward_pre_hook(_refuse_names, with_kwargs=True))
        self.handles.append(self.block.register_forward_pre_hook(self._enter, with_kwargs=True))

    def detach(self, attention: nn.Module) -> None:
        while self.handles:
            self.handles.pop().remove()

    def _enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _refuse_names(block, args, kwargs)
        route = self.source.passes.current.route
        if route is not None:
            states = (kwargs.get("hidden_states"), *args, *kwargs.values())
            samples = next(len(value) for value in states if isinstance(value, torch.Tensor))
            route.count(samples, self.stack, self.name)


def _refuse_names(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """PEFT takes the names out of the arguments; those that arrive with them are ignored by the model."""
    if "adapter_names" in kwargs:
        raise TypeError(
            f"adapter_names has been passed to {type(module).__name__}, which takes no notice of it: pass it to the "
            "PeftModel itself, `model(..., adapter_names=[...])` or `model.generate(...)`."
        )


class BlockStack(NamedTuple):
    """Where an attention is in its tower.

    Attributes:
        name (`str`): The name of the stack of blocks that it is in; its own if it is in none.
        modules (`nn.Module`): The stack.
        block_name (`str`): The name of its block; its own if it is in no stack.
        block (`nn.Module`): The block.
    """

    name: str
    modules: nn.Module
    block_name: str
    block: nn.Module

    @classmethod
    def around(cls, model: nn.Module, name: str) -> BlockStack:
        """That of the module `name` of a model."""
        stack, block = stack_name(model, name), name
        if stack is not None:
            block = ".".join(name.split(".")[: len(stack.split(".")) + 1])
        stack = stack or name
        return cls(stack, model.get_submodule(stack), block, model.get_submodule(block))

    def is_first(self, attention: nn.Module, kind: type[nn.Module]) -> bool:
        """Whether no module of a kind comes before an attention."""
        before = takewhile(lambda module: module is not attention, self.modules.modules())
        return not any(isinstance(module, kind) for module in before)


def route_modules_to_save(model: nn.Module, passes: Passes) -> None:
    """Make the `modules_to_save` of a model follow the route of the running forward pass."""
    layers = [name for name, module in model.named_modules() if isinstance(module, StandIn)]
    blocks = {BlockStack.around(model, name).block_name for name in layers}
    for name, module in model.named_modules():
        if type(module) is ModulesToSaveWrapper:
            # PEFT makes the wrappers and takes no class for them; another class keeps parameters and their names.
            module.__class__ = RoutedModulesToSave
        if isinstance(module, RoutedModulesToSave):
            module.passes, module.name = passes, name
            module.is_in_block = any(name.startswith(f"{block}.") for block in blocks)


def make_route(adapter_names: Any, known: Sequence[str], model: nn.Module, inputs: Mapping[Any, Any]) -> Route:
    """The route of a call of a model.

    Args:
        adapter_names: What the user gave.
        known (`Sequence[str]`): The adapters of the model.
        model (`nn.Module`): The model without PEFT's wrapper.
        inputs (`Mapping`): The arguments of the call, those without a name under their index.

    Raises:
        TypeError: The names are no list of names.
        ValueError: There is an unknown one.
    """
    if isinstance(adapter_names, str) or not all(isinstance(name, str) for name in adapter_names):
        raise TypeError(f"adapter_names={adapter_names!r} must be a list, of one adapter name per sample.")
    unknown = sorted(set(adapter_names) - {BASE_MODEL} - set(known))
    if unknown:
        raise ValueError(f"adapter_names has {unknown}, known are {[BASE_MODEL, *known]}.")
    tensors = [value for value in inputs.values() if isinstance(value, torch.Tensor)]
    copies, count = _copies(inputs), len(adapter_names)
    doubt = _doubt_about_copies(count, tensors) if copies > 1 else _doubt_about_texts(count, model, inputs)
    return Route(adapter_names, tensors[0].device if tensors else None, copies, doubt)


def _copies(inputs: Mapping[Any, Any]) -> int:
    """How many sequences `generate` grows from each sample at a time."""
    config = inputs.get("generation_config")
    names = ("num_beams", "num_return_sequences")
    return max(inputs.get(name) or getattr(config, name, None) or 1 for name in names)


def _doubt_about_copies(count: int, tensors: Sequence[torch.Tensor]) -> str:
    """Why copies of samples cannot be told from several images of a sample."""
    if all(len(tensor) == count and tensor.dim() < 5 for tensor in tensors if tensor.dim()):
        return ""
    return (
        "adapter_names with num_beams or num_return_sequences above 1 needs a text for each name, and no more than "
        "one image (crop, frame) for each text: copies of a text cannot be told from several images. Generate without "
        "them, or run the adapters one after the other."
    )


def _doubt_about_texts(count: int, model: nn.Module, inputs: Mapping[Any, Any]) -> str:
    """Why names may not be those of the images: some texts have none of them, so that others must have several.

    Then as many names as images may just as well be one for each text.
    """
    image_token = getattr(getattr(model, "config", None), "image_token_id", None)
    ids = next(
        (inputs[name] for name in ("input_ids", "inputs", 0) if isinstance(inputs.get(name), torch.Tensor)), None
    )
    if image_token is None or ids is None or ids.is_floating_point() or ids.dim() != 2 or len(ids) != count:
        return ""
    if torch.compiler.is_compiling():  # to look at the texts would break the graph
        return ""
    has_image = (ids == image_token).any(-1).tolist()
    if all(has_image) or not any(has_image):
        return ""
    without = [index for index, has in enumerate(has_image) if not has]
    return (
        f"adapter_names has {count} names for {count} texts and as many images, but texts {without} have no image, so "
        "that others have several: whether a name is for a text or for an image cannot be told. Pass texts without "
        "images in a batch of their own."
    )
