"""Visual prompts as what the attention makes of them: key-value prompts, which need nothing of the backbone."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from .adapter import PromptedAdapter
from .utils.modes import evaluating
from .utils.shards import refuse_shards


def convert_to_kv_prompts(model: nn.Module, adapter_name: str | None = None) -> None:
    """Turn the deep visual prompts of an adapter into key-value prompts that do the same, for inference.

    Nothing ever reads the output of a deep visual prompt `P`: all that it does are its keys and values,
    `k_proj(norm(P))` and `v_proj(norm(P))`. These become key-value prompts here, in front of those that there are, so
    that no pass has to compute them. In eager inference they are computed once anyway (see [`keep_prefixes`]); where
    nothing may become a constant, in `torch.compile`, exported models and CUDA graphs, each pass computed them.

    The adapter is another one afterwards, with `num_visual_prompts=0`, and is saved and loaded as such. It cannot be
    pruned or rewound, and has no dropout on what were visual prompts. Its prompts are right for the backbone as it is
    now: convert last, after training, and with the same LoRA adapter active beneath as in inference. There is no way
    back, so save the adapter first. Optimisers that were made before do not know the new parameters.

    Args:
        model (`nn.Module`): The adapted model.
        adapter_name (`str`, *optional*): The adapter; the active one by default.

    Raises:
        ValueError:
            The adapter has no deep visual prompts, or an activation on its key-value prompts, or the model is sharded,
            offloaded or has its adapters disabled. Nothing is changed.

    Example:

        ```py
        >>> from e2vpt_peft import convert_to_kv_prompts

        >>> model.save_pretrained("adapter")
        >>> convert_to_kv_prompts(model)
        >>> compiled = torch.compile(model.eval())
        ```
    """
    refuse_shards(model)
    adapter = PromptedAdapter.find(model, adapter_name)
    _check_convertible(adapter)
    config = replace(
        adapter.config,
        num_visual_prompts=0,
        num_kv_prompts=adapter.masks.num_tokens + adapter.config.num_kv_prompts,
        share_kv_prompts=False,
        token_mask=None,
        segment_mask=None,
    )
    with evaluating(model):
        prompts = [layer.as_kv_prompts(adapter.name) for layer in adapter.layers]
    adapter.set_config(config)
    for layer, each in zip(adapter.layers, prompts):
        layer.keep_kv_prompts_only(adapter.name, each)


def _check_convertible(adapter: PromptedAdapter) -> None:
    config, who = adapter.config, f"Adapter '{adapter.name}'"
    adapter.require_visual_prompts()
    if adapter.is_shallow:
        raise ValueError(
            f"{who} has visual_prompt_depth='shallow': such prompts are changed by each layer, differently for each "
            "image, so that no key-value prompts do the same."
        )
    if config.kv_prompt_activation is not None:
        raise ValueError(
            f"{who} has kv_prompt_activation={config.kv_prompt_activation!r}, which its visual prompts, once they are "
            "key-value prompts, would get as well. Keep it as it is."
        )
    adapter.require_values()
    if any(layer.disable_adapters for layer in adapter.layers):
        raise ValueError(f"{who} is disabled: convert it outside of model.disable_adapter().")
