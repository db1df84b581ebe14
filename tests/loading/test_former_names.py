from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from e2vpt_peft.loading.former_names import former_names, target_present_layout

from ..peft_contract.common import adapted, edit_config, layers_of, logits, small_config
from ..support.models import TINY_MODELS, tiny_vit

WEIGHTS = "adapter_model.safetensors"


class TestFormerLayouts:
    """Adapters that were saved when transformers named the attention modules of a model differently."""

    OLD = {"vit": "vit.encoder.layer.{}.attention.attention", "deit": "deit.encoder.layer.{}.attention.attention"}
    NEW = {"vit": "vit.layers.{}.attention", "deit": "deit.layers.{}.attention"}
    OLD["dinov2"], NEW["dinov2"] = "dinov2.encoder.layer.{}.attention.attention", "dinov2.encoder.layer.{}.attention"

    @pytest.mark.parametrize("family", list(OLD))
    def test_names_follow_from_the_tables_of_transformers(self, family: str) -> None:
        expected = {self.OLD[family].format(layer): self.NEW[family].format(layer) for layer in range(3)}
        model = TINY_MODELS[family]()
        assert former_names(model) == expected
        get_peft_model(model, small_config())
        assert former_names(model) == expected

    def test_models_of_other_libraries_have_none(self) -> None:
        assert former_names(nn.Linear(2, 2)) == {}

    def save_as_formerly(self, model: PeftModel, folder: Path, family: str, **config: Any) -> None:
        model.save_pretrained(folder)
        tensors = load_file(folder / WEIGHTS)
        for layer in range(3):
            new, old = self.NEW[family].format(layer), self.OLD[family].format(layer)
            tensors = {key.replace(f"{new}.", f"{old}."): value for key, value in tensors.items()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        edit_config(folder, **config)

    @pytest.mark.parametrize("family", list(OLD))
    @pytest.mark.parametrize(
        "targets, layers",
        [
            (["attention.attention"], None),
            (["attention.attention"], [0, 2]),
            (["layer.0.attention.attention", "layer.2.attention.attention"], None),
            (r".*\.layer\.(0|2)\.attention\.attention", None),
            (["attention"], None),
        ],
    )
    def test_a_former_adapter_gives_the_same_output(
        self, family: str, targets: Any, layers: Any, tmp_path: Path
    ) -> None:
        in_all = targets in (["attention"], ["attention.attention"]) and layers is None
        model = adapted(TINY_MODELS[family](), layers_to_transform=None if in_all else [0, 2])
        config = {"target_modules": targets, "layers_to_transform": layers, "backbone": None}
        self.save_as_formerly(model, tmp_path, family, **config)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            loaded = PeftModel.from_pretrained(TINY_MODELS[family](), tmp_path)
        assert len(layers_of(loaded)) == (3 if in_all else 2)
        assert torch.equal(logits(loaded), logits(model))
        loaded.save_pretrained(tmp_path / "again")
        again = PeftModel.from_pretrained(TINY_MODELS[family](), tmp_path / "again")
        assert torch.equal(logits(again), logits(model))

    def test_the_native_load_adapter_reports_what_it_cannot_rename(self, tmp_path: Path) -> None:
        """transformers renames the keys of adapters before PEFT is asked, by tables that know no prompts."""
        self.save_as_formerly(adapted(), tmp_path, "vit", target_modules=["attention.attention"])
        result = tiny_vit().load_adapter(str(tmp_path))
        assert len(result.missing_keys) == len(result.unexpected_keys) == 6

    def test_its_backbone_is_checked(self, tmp_path: Path) -> None:
        self.save_as_formerly(adapted(), tmp_path, "vit", target_modules=["attention.attention"])
        with pytest.raises(ValueError, match=r"number of layers 3 \(this model: 2\)"):
            PeftModel.from_pretrained(tiny_vit(num_hidden_layers=2), tmp_path)

    def test_targets_that_are_in_no_layout_are_refused_by_peft(self) -> None:
        with pytest.raises(ValueError, match="No modules were targeted"):
            get_peft_model(tiny_vit(), small_config(target_modules=["attn"]))


class TestConfigurations:
    """Of adapters that name their targets as they were called formerly."""

    def test_targets_that_are_there_stay_as_they_are(self) -> None:
        for targets in (None, ["attention"], r".*\.layers\.1\.attention", ["nowhere"]):
            config = small_config(target_modules=targets)
            target_present_layout(config, tiny_vit())
            assert config == small_config(target_modules=targets)

    def test_former_targets_become_the_present_names_of_the_same_layers(self) -> None:
        config = small_config(target_modules=["attention.attention"], layers_to_transform=[0, 2])
        excluded = small_config(
            target_modules=["attention.attention"], exclude_modules=["layer.1.attention.attention"]
        )
        for renamed in (config, excluded):
            target_present_layout(renamed, tiny_vit())
            assert renamed == small_config(target_modules=["vit.layers.0.attention", "vit.layers.2.attention"])
