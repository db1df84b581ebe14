"""A module's computation for prompts, of which nobody who watches the module hears.

Prompts pass the norm and the projections of the backbone a second time. Forward hooks (captured features, observers,
privacy engines) and running statistics are there for the user's data, and must not see them.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def quietly(module: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """What a module makes of states, without its hooks and those of the modules inside, and without its running
    statistics.

    Whatever replaces `forward` (accelerate's offloading), wraps a module (LoRA, `modules_to_save`) or makes a weight
    (parametrizations, and those of hooks, which the pass itself has called just before) has its effect. Modules that
    are sharded by themselves (FSDP2, ZeRO-3) work by hooks, and some by a call of their own: they are called as ever.
    Under `torch.compile`, hooks of modules inside of others (in a projection with LoRA) do fire.

    Args:
        module (`nn.Module`): A norm or a projection.
        states (`torch.Tensor`): Its input.
    """
    result: torch.Tensor
    if type(module).__call__ is not nn.Module.__call__ or _is_sharded(module):
        result = module(states)
    elif _is_watched_inside(module) and not torch.compiler.is_compiling():
        result = _unwatched(module).forward(states)
    else:
        result = module.forward(states)
    return result


def _is_sharded(module: nn.Module) -> bool:
    """Whether it, or a part of it, gathers its parameters by hooks: FSDP2's modules, and ZeRO-3's parameters."""
    if not module._modules and not module._forward_pre_hooks:
        return False
    if hasattr(module, "unshard") or any(hasattr(parameter, "ds_id") for parameter in module._parameters.values()):
        return True
    return any(_is_sharded(part) for part in module._modules.values() if part is not None)


def _is_watched_inside(module: nn.Module) -> bool:
    if isinstance(module, _NormBase) and module.training:
        return True
    parts = [part for part in module._modules.values() if part is not None]
    return any(_has_hooks(part) or _is_watched_inside(part) for part in parts)


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _unwatched(module: nn.Module) -> nn.Module:
    """The same module, with the same parameters, but without hooks, and with statistics that stay."""
    twin: Any = module.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    twin.__dict__.update({name: OrderedDict() for name in HOOKS})
    twin.__dict__["_modules"] = {
        name: None if part is None else _unwatched(part) for name, part in module._modules.items()
    }
    if isinstance(module, _NormBase):
        twin.__dict__["training"] = False
    result: nn.Module = twin
    return result
