from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from e2vpt_peft import E2VPTConfig, prune_prompts

from ..support.models import images, tiny_deit, tiny_vit

pytest.importorskip("matplotlib")
from e2vpt_peft.plots import plot_attention_on_image, plot_attention_to_prompts

INPUTS = {"pixel_values": images(2)}


def model(**config):
    return get_peft_model(tiny_vit(), E2VPTConfig(**{"num_visual_prompts": 3, "num_kv_prompts": 2, **config}))


def shares(figure):
    """The maps of shares by their title, (layers, heads)."""
    titled = {axes.get_title().replace("\n", " "): axes for axes in figure.axes if axes.get_title()}
    return {title: torch.tensor(axes.images[0].get_array().filled()) for title, axes in titled.items()}


def attentions(adapted):
    adapted.set_attn_implementation("eager")
    with torch.no_grad():
        return torch.stack(adapted.eval()(**INPUTS, output_attentions=True).attentions)


def test_shares_are_those_of_the_attention_weights():
    adapted = model()
    shown = shares(plot_attention_to_prompts(adapted, INPUTS))
    weights = attentions(adapted)  # (layers, images, heads, queries, keys)
    torch.testing.assert_close(shown["from class token to visual prompts"], weights[..., 0, :3].sum(-1).mean(1))
    torch.testing.assert_close(shown["from patches to key-value prompts"], weights[..., 1:, 3:5].sum(-1).mean((1, 3)))


def test_shallow_prompts_are_tokens_of_the_sequence():
    adapted = model(visual_prompt_depth="shallow")
    shown = shares(plot_attention_to_prompts(adapted, INPUTS))
    weights = attentions(adapted)  # keys: 2 key-value prompts, class token, 3 prompts, patches
    torch.testing.assert_close(shown["from class token to visual prompts"], weights[..., 0, 3:6].sum(-1).mean(1))
    torch.testing.assert_close(shown["from patches to key-value prompts"], weights[..., 4:, :2].sum(-1).mean((1, 3)))


def test_pruned_prompts_are_not_counted():
    adapted = model()
    prune_prompts(adapted, token_mask=[True, False, True])
    shown = shares(plot_attention_to_prompts(adapted, INPUTS))
    weights = attentions(adapted)
    torch.testing.assert_close(shown["from class token to visual prompts"], weights[..., 0, :2].sum(-1).mean(1))


def test_kinds_of_prompts_that_are_not_there_are_not_shown():
    assert len(shares(plot_attention_to_prompts(model(num_kv_prompts=0), INPUTS))) == 2


def test_models_with_two_special_tokens_have_as_many_rows():
    adapted = get_peft_model(tiny_deit(), E2VPTConfig(num_visual_prompts=3, num_kv_prompts=0))
    shown = shares(plot_attention_to_prompts(adapted, INPUTS))
    weights = attentions(adapted)
    torch.testing.assert_close(shown["from class token to visual prompts"], weights[..., :2, :3].sum(-1).mean((1, 3)))


@pytest.mark.parametrize("depth", ["deep", "shallow"])
def test_images_have_a_panel_for_each_head(depth):
    adapted = model(visual_prompt_depth=depth)
    figure = plot_attention_on_image(adapted, INPUTS, layer=1)
    assert len(figure.axes) == 2 * (1 + 1 + 4)
    weights = attentions(adapted)[1]
    patches = weights[0, 2, 0, -16:].view(4, 4)
    shown = torch.tensor(figure.axes[4].images[1].get_array().filled())
    torch.testing.assert_close(shown, patches / patches.max())


def test_the_model_is_left_as_it_was():
    adapted = model().train()
    adapted.base_model.model.vit.layers[0].eval()
    modes = [module.training for module in adapted.modules()]
    implementation = adapted.config._attn_implementation
    plot_attention_to_prompts(adapted, INPUTS)
    assert [module.training for module in adapted.modules()] == modes
    assert adapted.config._attn_implementation == implementation != "eager"


def test_a_model_without_an_adapter_is_refused():
    with pytest.raises(ValueError, match="the active E2VPT adapters are"):
        plot_attention_to_prompts(tiny_vit(), INPUTS)
