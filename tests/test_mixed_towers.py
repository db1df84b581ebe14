"""Different adapters in one batch of a model with several towers: names are for what enters the adapted one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipConfig,
    SiglipModel,
    SwinConfig,
    SwinForImageClassification,
)

from e2vpt_peft import E2VPTConfig
from e2vpt_peft.mixed_batch import make_route

from .support.bare import Bare, BareBlock
from .support.models import images, randomized
from .support.zoo import ZOO
from .test_mixed_batch import adapted

CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    depth: {
        "a": {"num_visual_prompts": 3, "num_kv_prompts": 2, "visual_prompt_depth": depth, "num_segments": 4},
        "b": {"num_visual_prompts": 1, "num_kv_prompts": 0, "visual_prompt_depth": depth, "num_segments": 4},
    }
    for depth in ("deep", "shallow")
}
NAMES = ["a", "b", "__base__"]
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE: dict[str, Any] = {**SIZES, "image_size": 16, "patch_size": 8}
WORDS: dict[str, Any] = {**SIZES, "vocab_size": 30, "max_position_embeddings": 12}
POOL = 5
"""How many images, and texts, batches are drawn from."""
IMAGE_TOKEN = 29
some_names = st.lists(st.sampled_from(NAMES), min_size=1, max_size=6)
few_cases = settings(max_examples=12, deadline=None)


def clip() -> CLIPModel:
    text = {**WORDS, "eos_token_id": 2, "pad_token_id": 1}
    return randomized(CLIPModel(CLIPConfig(text_config=text, vision_config=IMAGE, projection_dim=16)))  # type: ignore[return-value]


def siglip() -> SiglipModel:
    text = {**WORDS, "projection_size": 32}
    return randomized(SiglipModel(SiglipConfig(text_config=text, vision_config=IMAGE)))  # type: ignore[return-value]


def llava() -> LlavaForConditionalGeneration:
    text = LlamaConfig(**WORDS, num_key_value_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config = LlavaConfig(vision_config=CLIPVisionConfig(**IMAGE), text_config=text, image_token_id=IMAGE_TOKEN)
    return randomized(LlavaForConditionalGeneration(config))  # type: ignore[return-value]


def texts(count: int = POOL) -> torch.Tensor:
    ids = torch.randint(3, 29, (count, 8), generator=torch.Generator().manual_seed(1))
    ids[:, -1] = 2
    return ids


def texts_with_images(counts: list[int]) -> torch.Tensor:
    """One text for each count, with so many images (of 4 tokens)."""
    rows = [[1] + [IMAGE_TOKEN] * 4 * count + [5, 6] for count in counts]
    longest = max(map(len, rows))
    return torch.tensor([[0] * (longest - len(row)) + row for row in rows])


@torch.no_grad()
def run(model: PeftModel, name: str | list[str], **inputs: torch.Tensor) -> Any:
    """With one adapter active, or with a list of names."""
    if isinstance(name, list):
        return model(**inputs, adapter_names=name)
    if name == "__base__":
        with model.disable_adapter():
            return model(**inputs)
    model.set_adapter(name)
    return model(**inputs)


class TestDualEncoders:
    towers = pytest.mark.parametrize("tower", ["vision", "text", "both"])
    targets = {"vision": r".*vision_model.*self_attn", "text": r".*text_model.*self_attn", "both": r".*self_attn"}

    def model_and_embeddings(self, make: Any, tower: str, depth: str) -> tuple[PeftModel, dict[str, Any]]:
        configs = {name: {**config, "target_modules": self.targets[tower]} for name, config in CONFIGS[depth].items()}
        model = adapted(make(), configs, heads=[])
        alone = {name: run(model, name, input_ids=texts(), pixel_values=images(POOL)) for name in NAMES}
        assert not torch.allclose(alone["a"].logits_per_image, alone["b"].logits_per_image, atol=1e-3)
        return model, alone

    @pytest.mark.parametrize("make", [clip, siglip])
    @towers
    def test_each_input_of_the_adapted_tower_goes_through_its_adapter(self, make: Any, tower: str) -> None:
        depth = "shallow" if tower == "vision" else "deep"
        model, alone = self.model_and_embeddings(make, tower, depth)

        @few_cases
        @given(some_names, st.data())
        def check(names: list[str], data: Any) -> None:
            others = len(names) if tower == "both" else data.draw(st.integers(1, 6))
            counts = {"vision": (len(names), others)}.get(tower, (others, len(names)))
            rows = [
                torch.tensor(data.draw(st.lists(st.integers(0, POOL - 1), min_size=n, max_size=n))) for n in counts
            ]
            out = run(model, names, pixel_values=images(POOL)[rows[0]], input_ids=texts()[rows[1]])
            for kind, embeds, which in (("vision", "image_embeds", rows[0]), ("text", "text_embeds", rows[1])):
                mine = names if tower in (kind, "both") else ["a"] * len(which)  # which makes no difference there
                expected = torch.stack([alone[name][embeds][row] for name, row in zip(mine, which)])
                torch.testing.assert_close(out[embeds], expected, atol=1e-5, rtol=0)

        check()

    @towers
    def test_names_are_not_counted_at_another_tower(self, tower: str) -> None:
        model, _ = self.model_and_embeddings(clip, tower, "deep")
        sizes = {"vision": (4, 2), "text": (2, 4), "both": (4, 2)}[tower]
        inputs = {"pixel_values": images(POOL)[: sizes[0]], "input_ids": texts(sizes[1])}
        with pytest.raises(ValueError, match=r"has 2 names, but a batch of 4 arrives at '(vision|text)_model"):
            run(model, ["a", "b"], **inputs)
        if tower == "both":
            with pytest.raises(
                ValueError, match="a batch of 2 arrives at 'text_model.*different sizes, run the adapt"
            ):
                run(model, ["a", "b"] * 2, **inputs)
        else:
            run(model, ["a", "b"] * 2, **inputs)

    def test_a_head_of_the_other_tower_counts_its_own_inputs(self) -> None:
        model = adapted(clip(), CONFIGS["deep"], heads=["text_projection"])
        inputs = {"pixel_values": images(POOL)[:4], "input_ids": texts(2)}
        with pytest.raises(ValueError, match="has 4 names, but a batch of 2 arrives at 'text_projection'"):
            run(model, ["a", "b"] * 2, **inputs)
        model = adapted(clip(), CONFIGS["deep"], heads=["visual_projection"])
        expected = run(model, "b", **inputs).image_embeds[1]
        torch.testing.assert_close(run(model, ["a", "b"] * 2, **inputs).image_embeds[1], expected, atol=1e-5, rtol=0)

    def test_names_in_a_method_of_the_model_are_refused(self) -> None:
        """transformers' methods take any keyword and hand it down to the layers."""
        model, _ = self.model_and_embeddings(clip, "vision", "deep")
        with pytest.raises(TypeError, match=r"adapter_names.*pass it to the PeftModel itself"):
            model.get_image_features(pixel_values=images(2), adapter_names=["a", "b"])

    @pytest.mark.parametrize("counts", [[3, 1], [2, 2], [1, 2]])
    @pytest.mark.parametrize("heads", [[], ["lm_head"]])
    def test_copies_for_beams_are_not_taken_for_several_images(self, counts: list[int], heads: list[str]) -> None:
        model = adapted(llava(), CONFIGS["deep"], heads=heads)
        inputs = {"input_ids": texts_with_images(counts), "pixel_values": images(sum(counts))}
        for number in (2, sum(counts)):
            names = ["a", "b", "a", "b"][:number]
            with pytest.raises(ValueError, match="no more than one image|one name for each of these"):
                model.generate(**inputs, num_beams=2, max_new_tokens=2, adapter_names=names)


class WindowedBlock(BareBlock):
    """Cuts its input into two windows in front of its norm."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        windows = x.unflatten(1, (2, -1)).flatten(0, 1)
        return x + self.attn(self.ln_1(windows)).unflatten(0, (len(x), 2)).flatten(1, 2)


def bare(**parts: nn.Module) -> PeftModel:
    """A model from outside transformers, with some of its parts replaced."""
    torch.manual_seed(0)
    backbone = Bare()
    for name, part in parts.items():
        setattr(backbone, name, part)
    fields = {"target_modules": [r"attn"], "attention_norm": "ln_1"}
    return adapted(backbone, {name: {**config, **fields} for name, config in CONFIGS["deep"].items()}, heads=["ln_1"])


@torch.no_grad()
def run_bare(model: PeftModel, names: list[str], states: torch.Tensor) -> torch.Tensor:
    output: torch.Tensor = model(states, adapter_names=names)
    return output


@pytest.mark.parametrize("kind", ["in a stack", "windows in a stack", "in no stack"])
def test_models_from_elsewhere(kind: str) -> None:
    parts: dict[str, nn.Module] = {
        "in a stack": {},
        "windows in a stack": {"blocks": nn.ModuleList([WindowedBlock(), WindowedBlock()])},
        "in no stack": {"blocks": nn.Sequential(BareBlock(), BareBlock())},
    }[kind]
    model, states = bare(**parts), torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))
    names = ["b", "a", "__base__", "b"]
    alone = {name: run_bare(model, [name] * 4, states) for name in NAMES}
    assert not torch.allclose(alone["a"], alone["b"], atol=1e-3)
    expected = torch.stack([alone[name][row] for row, name in enumerate(names)])
    torch.testing.assert_close(run_bare(model, names, states), expected)
    model.set_adapter("b")
    torch.testing.assert_close(model(states), alone["b"])
    for number in (1, 2, 8):
        with pytest.raises(ValueError, match=f"has {number} names, but a batch of 4 arrives"):
            run_bare(model, ["a"] * number, states)


def test_windows_that_are_cut_where_no_block_counts_are_refused() -> None:
    """Nothing tells them from samples there."""
    model = bare(blocks=nn.Sequential(WindowedBlock(), WindowedBlock()))
    with pytest.raises(ValueError, match="has 4 names, but a batch of 8 arrives at 'blocks.0.ln_1'"):
        run_bare(model, ["a"] * 4, torch.randn(4, 6, 8))


@pytest.mark.parametrize("name", ["vit", "dpt"])  # which hands keywords down, and which drops them
def test_names_that_do_not_reach_the_tuner_are_refused(name: str) -> None:
    backbone = ZOO[name].make()
    config = E2VPTConfig(num_segments=4, layers_to_transform=[1])
    backbone.add_adapter(config)  # transformers' own way, which knows no adapter_names
    with pytest.raises(TypeError, match=f"passed to {type(backbone).__name__}, which takes no notice"):
        backbone(**ZOO[name].inputs(2), adapter_names=["default"] * 2)
    model = adapted(ZOO[name].make(), CONFIGS["deep"], heads=[])
    with pytest.raises(TypeError, match="passed to .*, which takes no notice"):
        model.base_model(**ZOO[name].inputs(2), adapter_names=["a"] * 2)
    unloaded = model.unload()
    assert not any(module._forward_pre_hooks for module in unloaded.modules())
    unloaded(**ZOO[name].inputs(2), adapter_names=["a"] * 2)


class TestSeveralImagesInASample:
    @staticmethod
    def features(model: PeftModel, name: str | list[str], counts: list[int], pixel_values: torch.Tensor) -> Any:
        """What the language model is given of each image."""
        got = []
        projector = model.get_base_model().model.multi_modal_projector
        handle = projector.register_forward_pre_hook(lambda module, args: got.append(args[0]))
        try:
            run(model, name, input_ids=texts_with_images(counts), pixel_values=pixel_values)
        finally:
            handle.remove()
        return got[0]

    @pytest.mark.parametrize("depth", CONFIGS)
    def test_names_are_for_images_however_they_are_divided_among_samples(self, depth: str) -> None:
        model, pool = adapted(llava(), CONFIGS[depth], heads=[]), images(POOL)
        alone = {name: self.features(model, name, [POOL], pool) for name in NAMES}
        assert not torch.allclose(alone["a"], alone["b"], atol=1e-3)

        @few_cases
        @given(st.lists(st.integers(1, 3), min_size=1, max_size=3), st.data())
        def check(counts: list[int], data: Any) -> None:
            total = sum(counts)
            names = data.draw(st.lists(st.sampled_from(NAMES), min_size=total, max_size=total))
            rows = data.draw(st.lists(st.integers(0, POOL - 1), min_size=total, max_size=total))
            got = self.features(model, names, counts, pool[rows])
            expected = torch.stack([alone[name][row] for name, row in zip(names, rows)])
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)

        check()

    @few_cases
    @given(st.lists(st.integers(0, 4), min_size=1, max_size=4).filter(sum), st.integers(0, 8))
    def test_any_other_number_of_names_is_refused(self, counts: list[int], number: int) -> None:
        model = self.model
        inputs = {"input_ids": texts_with_images(counts), "pixel_values": images(sum(counts))}
        if number != sum(counts):
            words = rf"has {number} names, but a batch of {sum(counts)} arrives at 'model.vision_tower"
        elif number == len(counts) and 0 in counts:
            words = rf"texts \[{counts.index(0)}\b.* have no image"
        else:
            return
        with pytest.raises(ValueError, match=words):
            run(model, ["a"] * number, **inputs)

    @property
    def model(self) -> PeftModel:
        cls = type(self)
        if not hasattr(cls, "_model"):
            cls._model = adapted(llava(), CONFIGS["deep"], heads=[])  # type: ignore[attr-defined]
        return cls._model  # type: ignore[attr-defined]

    def test_a_sample_without_images_leaves_open_what_names_are_for(self) -> None:
        inputs = {"input_ids": texts_with_images([2, 0]), "pixel_values": images(2)}
        with pytest.raises(ValueError, match=r"2 names for 2 texts and as many images, but texts \[1\] have no image"):
            run(self.model, ["a", "b"], **inputs)
        with pytest.raises(ValueError, match="no image"), torch.no_grad():
            self.model(inputs["input_ids"], inputs["pixel_values"], adapter_names=["a", "b"])

    def test_texts_alone_need_no_images(self) -> None:
        ids = texts_with_images([0, 0])
        assert torch.equal(run(self.model, ["a", "b"], input_ids=ids).logits, llava()(input_ids=ids).logits)

    @pytest.mark.parametrize("beams", [{"num_beams": 2}, {"num_beams": 3, "num_return_sequences": 3}])
    def test_generating_with_beams_keeps_each_sample_with_its_adapter(self, beams: dict[str, int]) -> None:
        model, names = adapted(llava(), CONFIGS["deep"], heads=["lm_head"]), ["a", "b", "__base__"]
        inputs = {"input_ids": texts_with_images([1] * 3), "pixel_values": images(3)}
        kwargs: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "output_scores": True}
        kwargs |= {"return_dict_in_generate": True, **beams}
        number = beams.get("num_return_sequences", 1)
        with torch.no_grad():
            got = model.generate(**inputs, **kwargs, adapter_names=names).sequences_scores.view(3, -1)
            for index, name in enumerate(names):
                one = {key: value[index : index + 1] for key, value in inputs.items()}
                expected = model.generate(**one, **kwargs, adapter_names=[name]).sequences_scores
                assert got[index].shape == expected.shape == (number,)
                torch.testing.assert_close(got[index], expected, atol=1e-5, rtol=1e-5)
        spread = got[:, 0]
        assert len({round(float(score), 4) for score in spread}) == 3


def test_windows_go_with_their_image() -> None:
    sizes = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4]}
    backbone = randomized(SwinForImageClassification(SwinConfig(**sizes, window_size=4, num_labels=5)))
    model = adapted(backbone, CONFIGS["deep"], heads=["classifier", "layernorm_before"])
    pool = images(POOL, 32)
    alone = {name: run(model, name, pixel_values=pool).logits for name in NAMES}
    names, rows = ["b", "a", "__base__", "a", "b"], [4, 4, 0, 1, 2]
    expected = torch.stack([alone[name][row] for name, row in zip(names, rows)])
    torch.testing.assert_close(run(model, names, pixel_values=pool[rows]).logits, expected, atol=1e-5, rtol=0)
    for number in (1, 2, 10):
        with pytest.raises(ValueError, match=f"has {number} names, but a batch of 4 arrives"):
            run(model, ["a"] * number, pixel_values=pool[:4])


def test_a_call_without_texts_leaves_no_doubt() -> None:
    """For example with the embeddings of texts and images."""
    model: Any = SimpleNamespace(config=SimpleNamespace(image_token_id=IMAGE_TOKEN))
    assert make_route(["a", "b"], ["a", "b"], model, {"inputs_embeds": torch.zeros(2, 5, 8)}).doubt == ""
