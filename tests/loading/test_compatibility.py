from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from torch import nn

from e2vpt_peft import E2VPTConfig
from e2vpt_peft.loading.compatibility import (
    check_backbone_sizes,
    check_modules_to_save,
    describe_backbone,
)

from ..peft_contract.common import KINDS, adapted, assert_unchanged, edit_config, layers_of, small_config, snapshot
from ..support.adapted import adapt, assert_refused, make
from ..support.models import images, tiny_vit

every_kind = pytest.mark.parametrize("kind", list(KINDS.values()), ids=list(KINDS))


@pytest.fixture
def saved(tmp_path: Path) -> tuple[PeftModel, Path]:
    model = adapted()
    model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "adapter"


OTHERS = {
    "hidden size": ({"hidden_size": 64, "num_attention_heads": 8}, r"hidden size 32 \(this model: 64\)"),
    "heads": ({"num_attention_heads": 2}, r"heads 4 \(this model: 2\), head size 8 \(this model: 16\)"),
    "fewer layers": ({"num_hidden_layers": 2}, r"number of layers 3 \(this model: 2\)"),
    "more layers": ({"num_hidden_layers": 4}, r"number of layers 3 \(this model: 4\)"),
}
other_backbones = pytest.mark.parametrize("sizes, message", list(OTHERS.values()), ids=list(OTHERS))


class TestBackbonesThatDoNotFit:
    @other_backbones
    @pytest.mark.parametrize("kind", list(KINDS.values()), ids=list(KINDS))
    def test_from_pretrained_refuses_in_words_and_changes_nothing(
        self, kind: dict, sizes: dict, message: str, tmp_path: Path
    ) -> None:
        adapted(**kind).save_pretrained(tmp_path)
        backbone = tiny_vit(**sizes)
        before = snapshot(backbone)
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(backbone, tmp_path)
        assert_unchanged(backbone, before)

    @other_backbones
    def test_load_adapter_refuses_in_words_and_changes_nothing(
        self, sizes: dict, message: str, saved: tuple[PeftModel, Path]
    ) -> None:
        model = adapted(tiny_vit(**sizes))
        before = snapshot(model)
        with pytest.raises(ValueError, match=message):
            model.load_adapter(saved[1], "other")
        assert_unchanged(model, before)

    @other_backbones
    def test_the_native_load_adapter_refuses_in_words_and_changes_nothing(
        self, sizes: dict, message: str, saved: tuple[PeftModel, Path]
    ) -> None:
        model = tiny_vit(**sizes)
        before = snapshot(model)
        with pytest.raises(ValueError, match=message):
            model.load_adapter(str(saved[1]))
        assert_unchanged(model, before)
        model.add_adapter(small_config(), "mine")
        before = snapshot(model)
        with pytest.raises(ValueError, match=message):
            model.load_adapter(str(saved[1]), adapter_name="other")
        assert_unchanged(model, before)

    @pytest.mark.parametrize("case", ["hidden size", "heads", "fewer layers"])
    @pytest.mark.parametrize("wrapped", [True, False])
    def test_set_peft_model_state_dict_refuses_in_words_and_loads_nothing(self, case: str, wrapped: bool) -> None:
        """A state dict does not tell for how many layers it was made, only for how many at least."""
        sizes, message = OTHERS[case]
        if wrapped:
            source: nn.Module = adapted()
            model: nn.Module = adapted(tiny_vit(**sizes))
        else:
            source = inject_adapter_in_model(small_config(), tiny_vit())
            model = inject_adapter_in_model(small_config(), tiny_vit(**sizes))
        before = snapshot(model)
        with pytest.raises(ValueError, match=message):
            set_peft_model_state_dict(model, get_peft_model_state_dict(source))
        assert_unchanged(model, before)

    def test_the_message_names_the_backbone_of_the_adapter(self, saved: tuple[PeftModel, Path]) -> None:
        edit_config(saved[1], base_model_name_or_path="google/vit-huge")
        with pytest.raises(ValueError, match=r"trained on \(google/vit-huge\)"):
            PeftModel.from_pretrained(tiny_vit(hidden_size=64), saved[1])

    def test_an_adapter_of_some_layers_names_the_layers_of_its_backbone(self, tmp_path: Path) -> None:
        adapted(layers_to_transform=[2]).save_pretrained(tmp_path)
        for layers in (2, 4):
            with pytest.raises(ValueError, match=rf"number of layers 3 \(this model: {layers}\)"):
                PeftModel.from_pretrained(tiny_vit(num_hidden_layers=layers), tmp_path)
        PeftModel.from_pretrained(tiny_vit(), tmp_path)

    def test_without_the_description_the_weights_are_checked(self, saved: tuple[PeftModel, Path]) -> None:
        edit_config(saved[1], backbone=None)
        with pytest.raises(ValueError, match=OTHERS["hidden size"][1]):
            PeftModel.from_pretrained(tiny_vit(**OTHERS["hidden size"][0]), saved[1])


def test_a_refused_second_adapter_leaves_the_first_as_it_was():
    model = get_peft_model(tiny_vit(), E2VPTConfig()).eval()
    before = model(pixel_values=images()).logits
    with pytest.raises(ValueError, match="num_segments=7"):
        model.add_adapter("second", E2VPTConfig(num_segments=7))
    assert list(model.peft_config) == ["default"]
    assert model.get_model_status().available_adapters == ["default"]
    assert torch.equal(model(pixel_values=images()).logits, before)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"target_modules": ["nowhere"]}, ["nowhere", "not found in the base model"]),
        ({"num_segments": 7}, ["num_segments=7", "hidden size 32"]),
        ({"layers_to_transform": [1, 9]}, ["layers_to_transform=[1, 9]", "no layer 9"]),
        ({"layers_to_transform": -1}, ["layers_to_transform=-1", "no layer -1"]),
        ({"layers_to_transform": [7]}, ["7"]),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused_in_words_and_nothing_is_changed(config, words):
    assert_refused(tiny_vit(), config, words)


class TestBackbones:
    def test_sizes_are_numbers_where_all_layers_have_the_same(self) -> None:
        sites = [layer.site for layer in layers_of(adapted())]
        sizes = {"hidden_size": 32, "num_heads": 4, "head_size": 8}
        assert describe_backbone(sites, 7) == {"num_layers": 7, **sizes}
        assert describe_backbone([], 7) == {"num_layers": 7}

    def test_and_lists_where_they_differ(self) -> None:
        sites = [layer.site for layer in layers_of(adapt(make("swin")))]
        assert describe_backbone(sites, 3) == {
            "num_layers": 3,
            "hidden_size": [16, 16, 32],
            "num_heads": [2, 2, 4],
            "head_size": 8,
        }

    def test_all_sizes_that_differ_are_named_and_what_is_not_known_is_not_compared(self) -> None:
        config = small_config(backbone={"hidden_size": 64, "num_heads": 8, "num_layers": 3})
        found = {"num_layers": 3, "hidden_size": 32, "num_heads": 4, "head_size": 8}
        words = r"with hidden size 64 \(this model: 32\), heads 8 \(this model: 4\)\. Load it"
        with pytest.raises(ValueError, match=words):
            check_backbone_sizes(config, found)
        check_backbone_sizes(config, {"num_layers": 3})
        check_backbone_sizes(small_config(), found)

    def test_an_adapter_that_is_made_notes_its_backbone_and_one_that_is_refused_does_not(self) -> None:
        assert adapted(layers_to_transform=[1]).peft_config["default"].backbone == {
            "num_layers": 3,
            "hidden_size": 32,
            "num_heads": 4,
            "head_size": 8,
        }
        refused = small_config(num_segments=7)
        with pytest.raises(ValueError, match="num_segments=7"):
            get_peft_model(tiny_vit(), refused)
        assert refused.backbone is None

    def test_quantised_modules_cannot_be_saved(self) -> None:
        model = tiny_vit()
        model.classifier.weight = nn.Parameter(torch.ones(5, 32, dtype=torch.int8), requires_grad=False)
        with pytest.raises(ValueError, match=r"modules_to_save=\['classifier'\] includes 'classifier'.*quantised"):
            check_modules_to_save(model, ["classifier"])
        check_modules_to_save(model, ["layernorm"])
        check_modules_to_save(model, None)


class TestModulesToSave:
    def test_those_that_peft_cannot_wrap_are_refused_before_anything_is_changed(self) -> None:
        for modules, words in {
            ("classifier", "q_proj"): r"'vit.layers.0.attention.q_proj', which is in an attention that gets prompts",
            ("classifier", "ayers"): "'vit.layers', which is a ModuleList",
            ("layers.0", "fc1"): "'vit.layers.0' and, inside of it, 'vit.layers.0.mlp.fc1'",
        }.items():
            refused = E2VPTConfig(modules_to_save=list(modules))
            backbone, model = tiny_vit(), adapted()
            for target, put in (
                (backbone, lambda: get_peft_model(backbone, refused)),  # noqa: B023
                (model, lambda: model.add_adapter("other", refused)),  # noqa: B023
            ):
                before = snapshot(target)
                with pytest.raises(ValueError, match=words):
                    put()
                assert_unchanged(target, before)
            model.add_adapter("other", small_config())
            get_peft_model(backbone, small_config())

    def test_a_layer_that_gets_no_prompts_can_be_saved_whole(self) -> None:
        get_peft_model(tiny_vit(), E2VPTConfig(modules_to_save=["layers.0"]))


def test_a_task_of_models_that_generate_is_refused_before_anything_is_changed() -> None:
    backbone = tiny_vit()
    before = snapshot(backbone)
    for task in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        with pytest.raises(ValueError, match=f"task_type='{task}' is for models that generate, which ViTFor"):
            get_peft_model(backbone, E2VPTConfig(task_type=task))
    assert_unchanged(backbone, before)
