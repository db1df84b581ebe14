from __future__ import annotations

import pytest
import torch
from torch import nn

from e2vpt_peft.loading.adapter_name import check_adapter_name

from ..peft_contract.common import adapted
from ..support.models import tiny_vit


class TestNames:
    def test_a_new_name_passes(self) -> None:
        for name in ("flowers", "a_b", "a-b", "0x", "Model", "vit_2", "team/flowers"):
            check_adapter_name(tiny_vit(), name)
        check_adapter_name(adapted(), "other")

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("__base__", "stands for the model without an adapter"),
            ("", "must have at least one character and no dot"),
            ("a.b", "must have at least one character and no dot"),
            ("/tmp/adapter", "is an absolute path"),
            ("C:adapter", "is an absolute path"),
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
