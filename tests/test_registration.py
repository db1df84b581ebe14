from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
from peft import get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import e2vpt_peft
from e2vpt_peft import E2VPTConfig, E2VPTModel, E2VPTType
from e2vpt_peft.registration import register_with_peft

from .support.models import images, tiny_vit

MAPPINGS = (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING)


@pytest.fixture
def mappings_restored():
    before = [dict(mapping) for mapping in MAPPINGS]
    yield
    for mapping, entries in zip(MAPPINGS, before):
        mapping.clear()
        mapping.update(entries)


def test_importing_the_package_registers_the_method():
    assert PEFT_TYPE_TO_CONFIG_MAPPING["E2VPT"] is E2VPTConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["E2VPT"] is E2VPTModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING["E2VPT"] == E2VPTModel.prefix


def test_registering_again_and_reloading_change_nothing(mappings_restored):
    before = [dict(mapping) for mapping in MAPPINGS]
    register_with_peft(E2VPTConfig, E2VPTModel)
    importlib.reload(e2vpt_peft)
    assert [dict(mapping) for mapping in MAPPINGS] == before


def test_a_fresh_import_after_forgetting_all_modules_works():
    script = (
        "import sys, importlib, e2vpt_peft\n"
        "for name in [name for name in sys.modules if name.startswith('e2vpt_peft')]: del sys.modules[name]\n"
        "again = importlib.import_module('e2vpt_peft')\n"
        "from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as mapping\n"
        "assert mapping['E2VPT'] is again.E2VPTConfig is not e2vpt_peft.E2VPTConfig\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("mapping", [PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING])
def test_a_name_taken_by_another_package_is_a_clear_error(mappings_restored, mapping):
    stranger = type("StrangerConfig", (), {"__module__": "stranger.config"})
    mapping[E2VPTType.E2VPT] = stranger
    with pytest.raises(KeyError, match="'E2VPT'.*taken by stranger.config.StrangerConfig"):
        register_with_peft(E2VPTConfig, E2VPTModel)
    assert mapping["E2VPT"] is stranger


def test_a_parameter_prefix_taken_by_another_package_is_a_clear_error(mappings_restored):
    stranger = type("StrangerConfig", (), {"__module__": "stranger.config"})
    PEFT_TYPE_TO_CONFIG_MAPPING["STRANGER"] = stranger
    PEFT_TYPE_TO_PREFIX_MAPPING["STRANGER"] = E2VPTModel.prefix
    with pytest.raises(KeyError, match="'e2vpt_' is taken by stranger.config.StrangerConfig"):
        register_with_peft(E2VPTConfig, E2VPTModel)


def test_model_status_shows_the_type():
    model = get_peft_model(tiny_vit(), E2VPTConfig())
    model(pixel_values=images())
    status = model.get_model_status()
    assert status.peft_types == {"default": "E2VPT"}
    assert status.adapter_model_type == "E2VPTModel"
    assert status.num_adapter_layers == 3
