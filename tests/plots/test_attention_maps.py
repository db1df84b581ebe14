from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from e2vpt_peft import E2VPTConfig, prune_prompts

from ..support.adapted import adapt, inputs, make
from ..support.bare import Bare
from ..support.models import BESIDE, images, tiny_deit, tiny_vit

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


@pytest.mark.parametrize("depth", ["deep", "shallow"])
def test_key_value_prompts_beside_the_attention_are_not_shown(depth):
    shown = shares(plot_attention_to_prompts(model(visual_prompt_depth=depth, **BESIDE), INPUTS))
    assert list(shown) == ["from class token to visual prompts", "from patches to visual prompts"]


@pytest.mark.parametrize("plot", [plot_attention_to_prompts, plot_attention_on_image])
def test_without_prompts_in_the_softmax_there_is_nothing_to_plot(plot):
    with pytest.raises(ValueError, match=r"kv_prompt_activation='gelu'.*pays them nothing"):
        plot(model(num_visual_prompts=0, **BESIDE), INPUTS)


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


# Special tokens in front, patches, tokens behind, in the first layer and in the last.
TOKENS = {
    "beit": [(1, 16, 0)] * 2,
    "yolos": [(1, 16, 5)] * 2,
    "eomt": [(5, 16, 0), (8, 16, 0)],  # 4 registers, and the 3 queries of the last layer stand in front
    "dinov3_vit": [(4, 16, 0)] * 2,
    "pixio": [(3, 16, 0)] * 2,
    "siglip_vision_model": [(0, 16, 0)] * 2,
}
every_layout = pytest.mark.parametrize("name", TOKENS)


def adapted_and_weights(name):
    """With 3 visual and 2 key-value prompts; and the weights by what attends, and to what."""
    adapted = adapt(make(name))
    with torch.no_grad():
        maps = adapt(make(name, "eager"))
        maps.load_state_dict(adapted.state_dict())
        weights = maps(**inputs(name, 2), output_attentions=True).attentions
    parts = []
    for layer, (special, patches, behind) in zip(weights, TOKENS[name], strict=True):
        assert layer.shape[-2:] == (special + patches + behind, 5 + special + patches + behind)
        keys = dict(
            zip(("visual", "kv", "special", "patches", "behind"), layer.split([3, 2, special, patches, behind], -1))
        )
        parts.append({kind: part.split([special, patches, behind], -2) for kind, part in keys.items()})
    return adapted, parts


@every_layout
def test_only_patches_are_taken_for_patches(name):
    adapted, parts = adapted_and_weights(name)
    shown = shares(plot_attention_to_prompts(adapted, inputs(name, 2)))
    for kind, title in (("visual", "visual"), ("kv", "key-value")):
        for row, source in enumerate(["class token", "patches"]):
            if source == "class token" and not TOKENS[name][0][0]:
                assert f"from {source} to {title} prompts" not in shown
                continue
            expected = torch.stack([layer[kind][row].sum(-1).mean((0, 2)) for layer in parts])
            torch.testing.assert_close(shown[f"from {source} to {title} prompts"], expected)


@every_layout
def test_the_grid_on_an_image_is_of_its_patches(name):
    adapted, parts = adapted_and_weights(name)
    for layer in range(2):
        panels = plot_attention_on_image(adapted, inputs(name, 2), layer=layer).axes
        looking = parts[layer]["patches"][0 if TOKENS[name][layer][0] else 1].mean(2)  # images, heads, patches
        heads = looking.shape[1]
        for image, head in ((0, 0), (1, heads - 1)):
            axes = panels[image * (2 + heads) + 2 + head]
            shown = torch.tensor(axes.images[1].get_array().filled())
            expected = looking[image, head].view(4, 4)
            torch.testing.assert_close(shown, expected / expected.max())
            prompts = sum(parts[layer][kind][0 if TOKENS[name][layer][0] else 1].sum(-1) for kind in ("visual", "kv"))
            assert axes.get_xlabel() == f"prompts {prompts[image, head].mean():.0%}"


def test_a_plain_torch_model_has_no_weights_to_show():
    adapted = adapt(Bare(), target_modules=["attn"], attention_norm="ln_1")
    for plot in (plot_attention_to_prompts, plot_attention_on_image):
        with pytest.raises(ValueError, match="Bare is no model of transformers.*nothing to plot"):
            plot(adapted, {"pixel_values": images(2)})


@pytest.mark.parametrize("name", ["swinv2", "data2vec-vision"])
def test_attention_that_is_written_out_has_no_weights_of_prompts_to_show(name):
    for plot in (plot_attention_to_prompts, plot_attention_on_image):
        with pytest.raises(ValueError, match="returns no attention weights of prompts: there is nothing to plot"):
            plot(adapt(make(name, "eager")), inputs(name, 2))


def test_layers_without_prompts_have_no_share():
    shown = shares(plot_attention_to_prompts(model(layers_to_transform=[1]), INPUTS))
    share = shown["from patches to visual prompts"]
    assert (share[1] > 0).all() and (share[[0, 2]] == 0).all()
