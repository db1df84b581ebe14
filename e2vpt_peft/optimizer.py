"""An optimizer with a learning rate for each kind of prompt."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

from .prompt_shapes import KV_PROMPTS, VISUAL_PROMPTS
from .utils.fields import check_positive


def create_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer] = AdamW,
    *,
    lr: float = 3e-3,
    visual_prompt_lr_ratio: float = 1.0,
    kv_prompt_lr_ratio: float = 1.0,
    weight_decay: float = 0.0,
    **kwargs: Any,
) -> Optimizer:
    """Make an optimizer for an adapted model, with a learning rate for each kind of prompt.

    Prompts do well with the rate of a head, so that both ratios are 1 by default. An optimizer like Adam moves every
    number by about its learning rate, whatever its size, and key-value prompts start small: on a tiny backbone, and
    without visual prompts beside them, they did better with ten times the rate. `docs/choosing.md` has the numbers.

    | parameters | learning rate | weight decay |
    |---|---|---|
    | matrices of the head, and of whatever else is trained (`modules_to_save`, LoRA) | `lr` | yes |
    | their biases and norms: all that is a vector or a number | `lr` | no |
    | visual prompts | `lr * visual_prompt_lr_ratio` | no |
    | key-value prompts | `lr * kv_prompt_lr_ratio` | no |

    Prompts do not decay, as tokens and position embeddings of a vision transformer usually do not.

    Args:
        model (`nn.Module`): The adapted model, a [`~peft.PeftModel`] or not. Frozen parameters are left out.
        optimizer_cls (`type[torch.optim.Optimizer]`, defaults to `torch.optim.AdamW`): The optimizer.
        lr (`float`, defaults to `3e-3`): The learning rate of all that is no prompt.
        visual_prompt_lr_ratio (`float`, defaults to `1.0`): How many times that rate visual prompts have.
        kv_prompt_lr_ratio (`float`, defaults to `1.0`): How many times that rate key-value prompts have.
        weight_decay (`float`, defaults to `0.0`): Of what decays.
        **kwargs: Those of the optimizer.

    Returns:
        `torch.optim.Optimizer`: With one parameter group for each row above that has parameters, in that order, so
        that `Trainer` logs `lr`.

    Raises:
        TypeError: A rate, a ratio or the decay is no number.
        ValueError: One of them is not above 0, the decay is below it, or nothing in the model is trainable.

    Example:

        ```py
        >>> model = get_peft_model(vit, E2VPTConfig(modules_to_save=["classifier"]))
        >>> trainer = Trainer(model, args, train_dataset=train, optimizers=(create_optimizer(model, lr=3e-3), None))
        ```

        Pruning replaces parameters, so that an [`E2VPTTrainer`] makes its optimizers itself, see
        [`PromptOptimizerFactory`].
    """
    for name, value in {
        "lr": lr,
        "visual_prompt_lr_ratio": visual_prompt_lr_ratio,
        "kv_prompt_lr_ratio": kv_prompt_lr_ratio,
    }.items():
        check_positive(name, value)
    check_positive("weight_decay", weight_decay, or_zero=True)
    groups: dict[str, dict[str, Any]] = {
        "matrices": {"params": [], "lr": lr, "weight_decay": weight_decay},
        "vectors": {"params": [], "lr": lr, "weight_decay": 0.0},
        VISUAL_PROMPTS: {"params": [], "lr": lr * visual_prompt_lr_ratio, "weight_decay": 0.0},
        KV_PROMPTS: {"params": [], "lr": lr * kv_prompt_lr_ratio, "weight_decay": 0.0},
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kinds = [kind for kind in (VISUAL_PROMPTS, KV_PROMPTS) if kind in name.split(".")]
            kind = kinds[0] if kinds else "matrices" if parameter.dim() > 1 else "vectors"
            groups[kind]["params"].append(parameter)
    used = [group for group in groups.values() if group["params"]]
    if not used:
        raise ValueError(
            f"{type(model).__name__} has no trainable parameter: load the adapter with is_trainable=True, or activate "
            "it with model.set_adapter(...)."
        )
    return optimizer_cls(used, lr=lr, **kwargs)  # type: ignore[call-arg]


class PromptOptimizerFactory:
    """[`create_optimizer`] for a Trainer, which calls it at the start of each training.

    So it is made for the parameters that there are then, also in the phases of an [`E2VPTTrainer`], which replace
    them.

    Example:

        ```py
        >>> trainer = E2VPTTrainer(..., optimizer_cls_and_kwargs=(PromptOptimizerFactory, {"lr": 3e-3}))
        ```
    """

    def __call__(self, model: nn.Module, **kwargs: Any) -> Optimizer:
        """Make the optimizer.

        Args:
            model (`nn.Module`): The adapted model.
            **kwargs: Those of [`create_optimizer`].
        """
        return create_optimizer(model, **kwargs)
