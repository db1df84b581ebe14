from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import FSDPModule

from e2vpt_peft import E2VPTConfig, prune_prompts, rewind_prompts, score_prompts
from e2vpt_peft.adapter import PromptedAdapter, active_adapters, adapter_names
from e2vpt_peft.masks import PromptMasks

from .support.models import prompt_parameters, tiny_vit

KINDS = {
    "deep": {},
    "shallow": {"visual_prompt_depth": "shallow"},
    "shallow alone": {"visual_prompt_depth": "shallow", "num_kv_prompts": 0},
    "some layers": {"layers_to_transform": [1, 2], "share_kv_prompts": False},
}
KEEP = torch.tensor([True, False, True, True])
ROWS = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 0], [1, 1, 1, 1]]).bool()
PRUNED = PromptMasks(KEEP, ROWS)
kinds = pytest.mark.parametrize("kind", KINDS)


def config(**fields):
    return E2VPTConfig(**{"num_visual_prompts": 4, "num_kv_prompts": 3, "num_segments": 4, **fields})


def adapted(**fields):
    model = get_peft_model(tiny_vit(), config(**fields)).eval()
    with torch.no_grad():
        for parameter in prompt_parameters(model).values():
            parameter.normal_()
    return model


def several():
    """Three adapters in different layers, the second of which is active."""
    model = adapted(layers_to_transform=[0])
    model.add_adapter("other", config(layers_to_transform=[1, 2], num_visual_prompts=2))
    model.add_adapter("third", config(num_visual_prompts=0))
    model.set_adapter("other")
    return model


def count(model, name="default"):
    return sum(parameter.numel() for key, parameter in prompt_parameters(model).items() if key.endswith(f".{name}"))


class TestFinding:
    def test_all_adapters_are_known_and_the_active_one_is_found_unless_another_is_named(self):
        model = several()
        assert adapter_names(model) == ["default", "other", "third"]
        assert active_adapters(model) == ["other"]
        assert PromptedAdapter.find(model).name == "other"
        found = {name: PromptedAdapter.find(model, name) for name in adapter_names(model)}
        assert {name: len(adapter.layers) for name, adapter in found.items()} == {"default": 1, "other": 2, "third": 3}
        assert all(adapter.config is model.peft_config[name] for name, adapter in found.items())

    def test_layers_are_in_the_order_of_the_model(self):
        model = several()
        attentions = [layer.attention for layer in model.base_model.model.vit.layers]
        assert [id(layer) for layer in PromptedAdapter.find(model).layers] == [id(layer) for layer in attentions[1:]]

    def test_several_active_ones_keep_their_order(self):
        model = several()
        model.base_model.set_adapter(["third", "default"])
        assert active_adapters(model) == ["third", "default"]

    def test_an_adapter_of_transformers_own_is_found(self):
        model = tiny_vit()
        model.add_adapter(config(), "native")
        adapter = PromptedAdapter.find(model)
        assert (adapter.name, adapter.backbone) == ("native", model)

    def test_the_backbone_is_the_model_without_the_wrapper_around_it(self):
        backbone = tiny_vit()
        model = get_peft_model(backbone, config())
        assert PromptedAdapter.find(model).backbone is backbone

    def test_an_unknown_one_is_refused_with_those_that_there_are(self):
        with pytest.raises(ValueError, match=r"adapter_name='rocks' is no E2VPT.*\['default', 'other', 'third'\]"):
            PromptedAdapter.find(several(), "rocks")

    def test_without_a_name_there_must_be_exactly_one_that_is_active(self):
        model = several()
        model.base_model.set_adapter(["other", "third"])
        with pytest.raises(ValueError, match=r"is needed: the active.* are \['other', 'third'\], of \['default', 'o"):
            PromptedAdapter.find(model)
        for model in (tiny_vit(), get_peft_model(tiny_vit(), LoraConfig(target_modules=["q_proj"]))):
            with pytest.raises(ValueError, match=r"the active E2VPT adapters are \[\], of \[\]"):
                PromptedAdapter.find(model)

    def test_key_value_prompts_alone_are_refused_where_visual_prompts_are_needed(self):
        adapter = PromptedAdapter.find(several(), "third")
        with pytest.raises(ValueError, match="Adapter 'third' has no visual prompts: there is nothing to score"):
            adapter.require_visual_prompts()
        PromptedAdapter.find(several(), "other").require_visual_prompts()

    def test_a_model_in_shards_is_found_and_only_not_scored_pruned_or_rewound(self):
        model = adapted()
        block = model.base_model.model.vit.layers[0]
        block.__class__ = type("Sharded", (FSDPModule, type(block)), {})
        assert PromptedAdapter.find(model).num_parameters() == count(model)
        for refused in (
            lambda: score_prompts(model, [], progress_bar=False),
            lambda: prune_prompts(model, token_mask=KEEP),
            lambda: rewind_prompts(model),
        ):
            with pytest.raises(ValueError, match="The model is in shards"):
                refused()
        assert PromptedAdapter.find(model).masks.num_tokens == 4


class TestMasks:
    @kinds
    @torch.no_grad()
    def test_what_stays_keeps_its_values(self, kind):
        model = adapted(**KINDS[kind])
        adapter = PromptedAdapter.find(model)
        before = [layer.full_prompts("default") for layer in adapter.visual_layers]
        others = {name: p.clone() for name, p in prompt_parameters(model).items() if "kv" in name}
        adapter.set_masks(PRUNED)
        assert adapter.masks == PRUNED == PromptMasks.of(model.peft_config["default"])
        kept = (KEEP[:, None] & ROWS).repeat(1, 8)
        for layer, prompts in zip(adapter.visual_layers, before, strict=True):
            assert torch.equal(layer.full_prompts("default"), prompts * kept)
            assert torch.equal(layer.kept_prompts("default"), (prompts * kept)[KEEP])
            assert layer.e2vpt_visual_prompts["default"].numel() == kept.sum()
        assert all(torch.equal(prompt_parameters(model)[name], value) for name, value in others.items())

    def test_what_comes_back_is_zero(self):
        adapter = PromptedAdapter.find(adapted())
        before = [layer.full_prompts("default") for layer in adapter.layers]
        adapter.set_masks(PRUNED)
        other = PromptMasks(~KEEP | torch.tensor([True, False, False, False]), torch.ones(4, 4, dtype=torch.bool))
        adapter.set_masks(other)
        kept = (KEEP & other.tokens)[:, None] & ROWS
        for layer, prompts in zip(adapter.layers, before):
            assert torch.equal(layer.full_prompts("default"), prompts * kept.repeat(1, 8))
            assert layer.e2vpt_visual_prompts["default"].shape == (2, 32)

    def test_other_adapters_keep_their_tensors(self):
        model = adapted()
        model.add_adapter("other", config())
        before = {name: (p, p.clone()) for name, p in prompt_parameters(model).items() if name.endswith(".other")}
        before_config = copy.deepcopy(model.peft_config["other"])
        PromptedAdapter.find(model, "default").set_masks(PRUNED)
        after = {name: p for name, p in prompt_parameters(model).items() if name.endswith(".other")}
        assert after.keys() == before.keys()
        assert all(after[name] is tensor and torch.equal(tensor, value) for name, (tensor, value) in before.items())
        assert model.peft_config["other"] == before_config

    def test_the_masks_that_it_has_change_nothing(self):
        model = adapted()
        adapter = PromptedAdapter.find(model)
        adapter.set_masks(PRUNED)
        before = {name: (p, p.clone()) for name, p in prompt_parameters(model).items()}
        adapter.set_masks(adapter.masks)
        for name, parameter in prompt_parameters(model).items():
            assert parameter is before[name][0] and torch.equal(parameter, before[name][1])

    def test_what_was_trainable_is_so_afterwards(self):
        model = adapted()
        model.add_adapter("frozen", config())
        for name in ("default", "frozen"):
            PromptedAdapter.find(model, name).set_masks(PRUNED)
        for name, parameter in prompt_parameters(model).items():
            assert parameter.requires_grad is name.endswith(".default"), name


class TestSizes:
    @kinds
    def test_parameters_are_counted_as_they_are(self, kind):
        model = adapted(**KINDS[kind])
        model.add_adapter("other", config(num_visual_prompts=2))
        for name in ("default", "other"):
            assert PromptedAdapter.find(model, name).num_parameters() == count(model, name)

    @kinds
    def test_what_a_pruning_would_leave_is_what_it_leaves_and_nothing_is_touched_to_know_it(self, kind):
        model = adapted(**KINDS[kind])
        adapter = PromptedAdapter.find(model)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        whole, promised = adapter.num_parameters(), adapter.num_parameters(PRUNED)
        assert promised < whole == count(model)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert adapter.masks == PromptMasks.unpruned(adapter.config)
        adapter.set_masks(PRUNED)
        assert adapter.num_parameters() == promised == count(model)
        assert adapter.num_parameters(PromptMasks.unpruned(adapter.config)) == whole

    @pytest.mark.parametrize(
        ("kind", "layers", "shallow"),
        [("deep", 3, False), ("shallow", 1, True), ("shallow alone", 1, True), ("some layers", 2, False)],
    )
    def test_shallow_prompts_are_in_one_layer(self, kind, layers, shallow):
        adapter = PromptedAdapter.find(adapted(**KINDS[kind]))
        assert (len(adapter.visual_layers), adapter.is_shallow) == (layers, shallow)
        assert adapter.visual_layers == adapter.layers[:layers]


class TestSavedModules:
    def test_they_are_those_of_this_adapter_by_their_names_in_the_backbone(self):
        model = adapted(modules_to_save=["classifier", "vit.layernorm"])
        model.add_adapter("other", config(modules_to_save=["classifier"]))
        model.add_adapter("bare", config())
        base = model.base_model.model
        found = {name: PromptedAdapter.find(model, name) for name in ("default", "other", "bare")}
        assert found["default"].saved_modules == {"vit.layernorm": base.vit.layernorm, "classifier": base.classifier}
        assert found["other"].saved_modules == {"classifier": base.classifier}
        assert found["other"].trained_modules == {"classifier": base.classifier.modules_to_save["other"]}
        assert found["bare"].saved_modules == found["bare"].trained_modules == {}
        assert isinstance(found["other"].trained_modules["classifier"], nn.Linear)
