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

from e2vpt_peft import E2VPTConfig, E2VPTLayer
from e2vpt_peft.loading.compatibility import (
    check_adapter_name,
    check_backbone_sizes,
    check_modules_to_save,
    check_nothing_overwritten,
    check_saved_prompts,
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


class TestNames:
    def test_a_new_name_passes(self) -> None:
        for name in ("flowers", "a_b", "a-b", "0x", "Model", "vit_2"):
            check_adapter_name(tiny_vit(), name)
        check_adapter_name(adapted(), "other")

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("__base__", "stands for the model without an adapter"),
            ("", "must have at least one character and no dot"),
            ("a.b", "must have at least one character and no dot"),
            ("keys", "is the name of a method of PyTorch's containers"),
            ("attention", "is also the name of a part of the model"),
            ("weight", "is also the name of a part of the model"),
            ("modules_to_save", "is also the name of a part of the model"),
            ("e2vpt_kv_prompts", "is also the name of a part of the model"),
        ],
    )
    def test_a_name_that_cannot_be_is_refused_with_the_reason(self, name: str, words: str) -> None:
        with pytest.raises(ValueError, match=f"^adapter_name='{name}' {words}"):
            check_adapter_name(adapted(), name)

    def test_a_name_that_is_taken_is_refused_in_the_words_of_peft(self) -> None:
        with pytest.raises(ValueError, match="^Adapter with name 'default' already exists. Choose another"):
            check_adapter_name(adapted(), "default")

    def test_names_in_containers_which_may_be_adapters_are_no_parts_of_the_model(self) -> None:
        model = tiny_vit()
        model.heads = nn.ModuleDict({"flowers": nn.Linear(2, 2)})
        model.rows = nn.ParameterDict({"trees": torch.ones(2)})
        for name in ("flowers", "trees"):
            check_adapter_name(model, name)
        with pytest.raises(ValueError, match="adapter_name='heads' is also the name of a part"):
            check_adapter_name(model, "heads")


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


class TestSavedPrompts:
    """Prompts by their names in the model, as PEFT is about to load them."""

    def saved(self, model: PeftModel) -> dict[str, torch.Tensor]:
        names = [name for name, _ in model.named_modules() if name.endswith("attention")]
        return {f"{name}.e2vpt_visual_prompts": torch.ones(2, 32) for name in names}

    def check(self, model: PeftModel, prompts: dict[str, torch.Tensor]) -> None:
        layers = {name: module for name, module in model.named_modules() if isinstance(module, E2VPTLayer)}
        check_saved_prompts(layers, model, prompts)

    def test_those_of_the_model_pass_whatever_their_number(self) -> None:
        model = adapted()
        self.check(model, self.saved(model))
        self.check(model, {name: torch.ones(9, 32) for name in self.saved(model)})
        self.check(model, {name: torch.ones(20) for name in self.saved(model)})  # with pruned segments

    def test_all_sizes_that_differ_are_named_once(self) -> None:
        model = adapted()
        prompts = {name: torch.ones(2, 64) for name in self.saved(model)}
        prompts |= {name.replace("visual", "kv"): torch.ones(8, 3, 8) for name in prompts}
        with pytest.raises(ValueError, match=r"with hidden size 64 \(this model: 32\), heads 8 \(this model: 4\)\."):
            self.check(model, prompts)

    def test_prompts_for_layers_that_are_not_there_tell_how_many_layers_there_were(self) -> None:
        model = adapted()
        prompts = self.saved(model)
        more = {name.replace("layers.2", "layers.3"): value for name, value in prompts.items()}
        with pytest.raises(ValueError, match=r"number of layers 4 \(this model: 3\)"):
            self.check(model, {**prompts, **more})
        self.check(adapted(layers_to_transform=[0]), prompts)  # they are there, and not adapted

    def test_values_that_are_not_finite_are_refused(self) -> None:
        model = adapted()
        prompts = {name: value * float("nan") for name, value in self.saved(model).items()}
        with pytest.raises(ValueError, match="The state dict of the adapter: 64 of 64 values of 'base_model.*are NaN"):
            self.check(model, prompts)

    def test_what_would_overwrite_the_model_or_another_adapter_is_refused(self) -> None:
        model = adapted()
        own = [f"base_model.model.classifier.modules_to_save.default.{part}" for part in ("weight", "bias")]
        check_nothing_overwritten(model, "default", [*self.saved(model), *own, "base_model.model.nowhere"])
        for name in ("base_model.model.vit.layernorm.weight", "vit.layernorm.weight", own[0]):
            with pytest.raises(ValueError, match=f"has '.*{name}' .1 such tensors., .* overwrite the model"):
                check_nothing_overwritten(model, "other", [name])
