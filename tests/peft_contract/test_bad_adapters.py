"""Saved adapters that are damaged, foreign, contradictory or malicious: refused in words, and nothing is changed."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModel, LoraConfig, PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft import get_peft_model_state_dict as state_dict_of
from safetensors.torch import load_file, save_file

from e2vpt_peft import E2VPTConfig, E2VPTLayer

from ..support.models import tiny_vit
from .common import adapted, assert_unchanged, logits, small_config, snapshot

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PROMPTS = "base_model.model.vit.layers.{}.attention.e2vpt_{}_prompts"
VISUAL, KV = PROMPTS.format(1, "visual"), PROMPTS.format(2, "kv")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    adapted().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit_config(folder: Path, **values: Any) -> None:
    file = folder / CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def edit_tensors(folder: Path, **values: Any) -> None:
    """Give tensors other values, or drop them (`None`)."""
    tensors: dict[str, Any] = {**load_file(folder / WEIGHTS), **values}
    save_file({name: value for name, value in tensors.items() if value is not None}, folder / WEIGHTS)


def edit_bytes(folder: Path, edit: Callable[[bytes], bytes]) -> None:
    (folder / WEIGHTS).write_bytes(edit((folder / WEIGHTS).read_bytes()))


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def link_to(target: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / WEIGHTS).symlink_to(target)

    return edit


def of_lora(folder: Path) -> None:
    tensors = state_dict_of(get_peft_model(tiny_vit(), LoraConfig(target_modules=["q_proj"])))
    save_file(tensors, folder / WEIGHTS)


def bad(value: float) -> torch.Tensor:
    prompts = torch.zeros(2, 32)
    prompts[1, 3] = value
    return prompts


def flipped(at: int) -> Callable[[bytes], bytes]:
    return lambda content: content[:at] + bytes([content[at] ^ 0x40]) + content[at + 1 :]


WRONG_WEIGHTS: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "empty": (lambda f: edit_bytes(f, lambda _: b""), [WEIGHTS, "damaged, cut short, or no safetensors"]),
    "cut in the header": (lambda f: edit_bytes(f, lambda b: b[:100]), [WEIGHTS, "damaged, cut short"]),
    "cut in the data": (lambda f: edit_bytes(f, lambda b: b[:-1]), [WEIGHTS, "damaged, cut short"]),
    "too long": (lambda f: edit_bytes(f, lambda b: b + b"x"), [WEIGHTS, "damaged"]),
    "a flipped length": (lambda f: edit_bytes(f, flipped(2)), [WEIGHTS, "damaged"]),
    "a huge length": (lambda f: edit_bytes(f, lambda b: struct.pack("<Q", 2**62) + b[8:]), [WEIGHTS, "damaged"]),
    "a flipped brace": (lambda f: edit_bytes(f, flipped(8)), [WEIGHTS, "damaged"]),
    "text": (lambda f: edit_bytes(f, lambda _: b"<html>404</html>" * 9), [WEIGHTS, "damaged"]),
    "a pickle under its name": (lambda f: torch.save({"a": torch.zeros(3)}, f / WEIGHTS), [WEIGHTS, "damaged"]),
    "a pickle": (pickled, ["adapter_model.bin", "pickle", "safetensors.torch.save_file"]),
    "another method": (of_lora, ["no prompts", "lora_A", "not the file of an E2VPT adapter"]),
    "a device": (link_to("/dev/zero"), ["is no file"]),
    "a folder": (link_to("/"), ["is no file"]),
    "nothing": (link_to("/nowhere"), ["is no file"]),
    "another file": (link_to("/etc/hostname"), [WEIGHTS, "damaged"]),
    "NaN": (lambda f: edit_tensors(f, **{VISUAL: bad(float("nan"))}), [VISUAL, "1 of 64 values", "NaN or infinite"]),
    "infinity": (lambda f: edit_tensors(f, **{VISUAL: bad(float("-inf"))}), [VISUAL, "NaN or infinite", "diverged"]),
    "integers": (lambda f: edit_tensors(f, **{KV: torch.zeros(4, 3, 8, dtype=torch.int64)}), [KV, "type I64"]),
    "fewer prompts": (lambda f: edit_tensors(f, **{VISUAL: torch.zeros(1, 32)}), [VISUAL, "(1, 32)", "(2, 32)"]),
    "another width": (lambda f: edit_tensors(f, **{VISUAL: torch.zeros(2, 31)}), [VISUAL, "(2, 31)", "(2, 32)"]),
    "no dimension": (lambda f: edit_tensors(f, **{KV: torch.tensor(1.0)}), [KV, "shape ()", "(4, 3, 8)"]),
    "unshared": (lambda f: edit_tensors(f, **{KV: torch.zeros(2, 4, 3, 8)}), [KV, "share_kv_prompts", "(4, 3, 8)"]),
    "the backbone's weights": (
        lambda f: edit_tensors(f, **{"base_model.model.vit.layers.0.mlp.fc1.weight": torch.zeros(64, 32)}),
        ["fc1.weight", "overwrite the backbone", "modules_to_save=['classifier']"],
    ),
    "the backbone's own head": (
        lambda f: edit_tensors(f, **{"base_model.model.classifier.original_module.bias": torch.zeros(5)}),
        ["classifier.original_module.bias", "overwrite the backbone"],
    ),
}

WRONG_CONFIGS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "more prompts than saved": ({"num_visual_prompts": 9}, ["(2, 32)", "num_visual_prompts", "(9, 32)"]),
    "a huge number of prompts": (
        {"num_visual_prompts": 10**12},
        ["num_visual_prompts=1000000000000", "10000"],
    ),
    "a huge number of rows": ({"num_kv_prompts": 10**7}, ["num_kv_prompts=10000000", "10000 or less"]),
    "no visual prompts": ({"num_visual_prompts": 0}, ["e2vpt_visual_prompts", "(2, 32)", "should be none"]),
    "a mask of another length": ({"token_mask": [True] * 3}, ["token_mask", "2 booleans"]),
    "a mask of numbers": ({"token_mask": [1, 1]}, ["token_mask", "booleans"]),
    "a mask that keeps nothing": ({"token_mask": [False, False]}, ["token_mask", "keeps nothing"]),
    "a mask for fewer prompts than saved": ({"token_mask": [True, False]}, ["(2, 32)", "token_mask", "(1, 32)"]),
    "a mask of segments": (
        {"segment_mask": [[True] * 15 + [False]] * 2},
        ["(2, 32)", "segment_mask", "(60)"],
    ),
    "a flat mask of segments": ({"segment_mask": [True] * 32}, ["segment_mask", "2 lists of 16 booleans"]),
    "text for a number": ({"num_kv_prompts": "3"}, ["num_kv_prompts='3'", "integer"]),
    "text for a switch": ({"share_kv_prompts": "true"}, ["share_kv_prompts='true'", "True or False"]),
    "text for a list": ({"modules_to_save": "classifier"}, ["modules_to_save='classifier'", "list of names"]),
    "numbers for names": ({"target_modules": [1, 2]}, ["target_modules=[1, 2]", "list of names"]),
    "an object for names": ({"target_modules": {"a": 1}}, ["target_modules={'a': 1}", "list of names"]),
    "no pattern": ({"target_modules": "(attention"}, ["target_modules='(attention'", "no regular expression"]),
    "layers by name": ({"layers_to_transform": ["0"]}, ["layers_to_transform=['0']", "integer"]),
    "a layer that is not there": ({"layers_to_transform": [99]}, ["layers_to_transform=[99]", "no layer 99"]),
    "text for the backbone": ({"backbone": "vit"}, ["backbone='vit'", "dictionary"]),
    "an impossible backbone": ({"backbone": {"hidden_size": 0}}, ["backbone['hidden_size']=0"]),
    "another number of layers": ({"backbone": {"num_layers": 12}}, ["for 3 layers", "should be 12"]),
    "another backbone": ({"backbone": {"hidden_size": 64}}, ["(2, 32)", "(2, 64)"]),
    "sizes of more layers than there are": (
        {"backbone": {"num_layers": 3, "num_heads": [4] * 9}},
        ["backbone=", "lists of [9] sizes", "at most 3"],
    ),
    "lists of sizes of different lengths": (
        {"backbone": {"num_layers": 3, "num_heads": [4] * 2, "head_size": [8] * 3}},
        ["backbone=", "lists of [2, 3] sizes"],
    ),
    "a huge number of segments": ({"num_segments": 2**70}, [f"num_segments={2**70}", "10,000,000 in all"]),
    "many segments of many prompts": (
        {"num_visual_prompts": 10_000, "num_segments": 20_000},
        ["num_segments=20000 of num_visual_prompts=10000", "10,000,000 in all"],
    ),
    "a list of names without end": ({"target_modules": ["a"] * 1001}, ["target_modules has 1001 names", "1000"]),
    "a pattern for a module to save": (
        {"modules_to_save": ["classifier", r"(\w+\.?)+!"]},
        [r"modules_to_save has '(\\w+\\.?)+!'", "pattern"],
    ),
    "half a pattern for a module to save": ({"modules_to_save": ["("]}, ["modules_to_save has '('", "pattern"]),
    "a pattern for the layers": (
        {"layers_pattern": [r"(\w+\.?)+!"], "layers_to_transform": [0]},
        [r"layers_pattern has '(\\w+\\.?)+!'", "pattern"],
    ),
    "half a pattern for the layers": (
        {"layers_pattern": "(", "layers_to_transform": [0]},
        ["layers_pattern has '('", "pattern"],
    ),
    "a task of models that generate": ({"task_type": "CAUSAL_LM"}, ["task_type='CAUSAL_LM'", "generate"]),
    "a task with a head that is not saved": (
        {"task_type": "SEQ_CLS", "modules_to_save": None},
        ["classifier", "overwrite the backbone"],
    ),
    "a projection as a module to save": (
        {"modules_to_save": ["classifier", "q_proj"]},
        ["'vit.layers.0.attention.q_proj'", "in an attention that gets prompts"],
    ),
    "a list as a module to save": (
        {"modules_to_save": ["classifier", "ayers"]},
        ["'vit.layers', which is a ModuleList", "name the modules in it"],
    ),
    "a module in another to save": (
        {"modules_to_save": ["classifier", "layers.0", "fc1"], "layers_to_transform": [1, 2]},
        ["'vit.layers.0' and, inside of it, 'vit.layers.0.mlp.fc1'"],
    ),
    "the prefix of PEFT as a module to save": ({"modules_to_save": ["model"]}, ["classifier", "overwrite"]),
    "targets that match nothing": ({"target_modules": ["nowhere"]}, ["No modules were targeted", "target_modules"]),
    "PEFT's name for no targets": ({"target_modules": "dummy-target-modules"}, ["matches no self-attention"]),
    "a list for a mode": ({"inference_mode": []}, ["inference_mode=[]", "True or False"]),
    "a list for a path": ({"base_model_name_or_path": ["a"]}, ["base_model_name_or_path=['a']", "string"]),
    "text for a mapping": ({"auto_mapping": "os"}, ["auto_mapping='os'", "dictionary"]),
    "no task": ({"task_type": 7}, ["Invalid task type: '7'"]),
    "no number": ({"prompt_dropout": float("nan")}, ["prompt_dropout=nan"]),
    "a newer version": ({"prompt_mixing": "soft"}, ["prompt_mixing='soft'", "newer version", "Upgrade"]),
}


def assert_refused(folder: Path, words: list[str]) -> None:
    """By `load_adapter` beside another adapter, and by `from_pretrained`."""
    model, backbone = adapted(), tiny_vit()
    for target, load in (
        (model, lambda: model.load_adapter(folder, "other")),
        (backbone, lambda: PeftModel.from_pretrained(backbone, folder)),
    ):
        before = snapshot(target)
        with pytest.raises((ValueError, TypeError)) as raised:
            load()
        for word in words:
            assert word in str(raised.value)
        assert_unchanged(target, before)


@pytest.mark.parametrize("case", WRONG_WEIGHTS)
def test_wrong_weights_are_refused_before_the_model_is_changed(case: str, folder: Path) -> None:
    edit, words = WRONG_WEIGHTS[case]
    edit(folder)
    assert_refused(folder, words)


@pytest.mark.parametrize("case", WRONG_CONFIGS)
def test_wrong_configurations_are_refused_before_the_model_is_changed(case: str, folder: Path) -> None:
    values, words = WRONG_CONFIGS[case]
    edit_config(folder, **values)
    assert_refused(folder, words)


@pytest.mark.parametrize("case", ["text for a number", "a huge number of prompts", "a mask of another length"])
def test_transformers_own_load_adapter_refuses_wrong_configurations(case: str, folder: Path) -> None:
    values, words = WRONG_CONFIGS[case]
    edit_config(folder, **values)
    model = tiny_vit()
    before = snapshot(model)
    with pytest.raises((ValueError, TypeError)) as raised:
        model.load_adapter(str(folder))
    assert all(word in str(raised.value) for word in words)
    assert_unchanged(model, before)


def test_a_missing_field_has_its_default_and_is_held_against_the_weights(folder: Path) -> None:
    content = json.loads((folder / CONFIG).read_text())
    del content["num_visual_prompts"]
    (folder / CONFIG).write_text(json.dumps(content))
    assert_refused(folder, ["(2, 32)", "(10, 32)"])


def test_a_field_of_a_newer_version_that_is_not_in_use_is_ignored_with_a_warning(folder: Path) -> None:
    edit_config(folder, prompt_mixing=None)
    with pytest.warns(UserWarning, match="prompt_mixing"):
        PeftModel.from_pretrained(tiny_vit(), folder)


@pytest.mark.parametrize(
    ("edit", "error"),
    [
        (lambda content: content[: len(content) // 2], ValueError),
        (lambda content: content.replace("E2VPT", "E3VPT"), KeyError),
        (lambda content: "[]", TypeError),
    ],
)
def test_a_file_that_is_no_configuration_is_refused_by_peft(edit: Any, error: type, folder: Path) -> None:
    """Before it asks the method."""
    (folder / CONFIG).write_text(edit((folder / CONFIG).read_text()))
    model = adapted()
    before = snapshot(model)
    with pytest.raises(error):
        model.load_adapter(folder, "other")
    assert_unchanged(model, before)


@pytest.mark.parametrize("path", ["nowhere", "adapter/adapter_model.safetensors", "adapter/../..", "adapter\0"])
def test_a_path_without_an_adapter_is_refused(path: str, folder: Path) -> None:
    model = adapted()
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"Can't find '{CONFIG}'|null"):
        model.load_adapter(os.path.join(folder.parent, path), "other")
    assert_unchanged(model, before)


def test_a_huge_promise_takes_no_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit_config(folder, num_visual_prompts=10_000, num_kv_prompts=10_000)
    model, backbone = adapted(), tiny_vit()
    monkeypatch.setattr(E2VPTLayer, "draw_initial_prompts", lambda *_: pytest.fail("memory was spent"))
    for load in (lambda: model.load_adapter(folder, "other"), lambda: PeftModel.from_pretrained(backbone, folder)):
        with pytest.raises(ValueError, match="10000"):
            load()


def test_a_backbone_of_unknown_sizes_leaves_the_number_of_prompts_to_check(folder: Path) -> None:
    edit_config(folder, backbone=None)
    assert torch.isfinite(logits(PeftModel.from_pretrained(tiny_vit(), folder))).all()
    edit_config(folder, num_visual_prompts=9)
    assert_refused(folder, ["(2, 32)", "(9, any)"])


def test_pruned_and_unshared_prompts_pass(tmp_path: Path) -> None:
    masks = {"token_mask": [True, False], "segment_mask": [[True] * 12 + [False] * 4, [False] * 16]}
    model = adapted(share_kv_prompts=False, **masks)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_vit(), tmp_path)), logits(model))


def test_the_configuration_alone_can_be_read_whatever_the_weights_are(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"")
    assert PeftConfig.from_pretrained(folder) == small_config(
        backbone=PeftConfig.from_pretrained(folder).backbone,
        target_modules=PeftConfig.from_pretrained(folder).target_modules,
        auto_mapping=PeftConfig.from_pretrained(folder).auto_mapping,
        inference_mode=True,
    )
    with pytest.raises(ValueError, match="damaged"):
        E2VPTConfig.from_pretrained(folder)
    (folder / WEIGHTS).unlink()
    assert isinstance(PeftConfig.from_pretrained(folder), E2VPTConfig)
    assert_refused(folder, ["has the configuration of a saved adapter, but no adapter_model.safetensors"])


def test_a_configuration_that_was_saved_alone_can_be_used_again(tmp_path: Path) -> None:
    small_config().save_pretrained(tmp_path)
    assert E2VPTConfig.from_pretrained(tmp_path) == small_config()


class TestStateDicts:
    """Checked where PEFT reads the file or a state dict is given, whichever way the configuration came."""

    def test_prompts_that_are_not_finite(self) -> None:
        model, state_dict = adapted(), state_dict_of(adapted())
        state_dict[VISUAL] = bad(float("inf"))
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"layers\.1\.attention\.e2vpt_visual_prompts.*NaN or infinite"):
            set_peft_model_state_dict(model, state_dict)
        assert_unchanged(model, before)

    @pytest.mark.parametrize("prefix", ["base_model.model.", ""])
    def test_weights_of_the_backbone(self, prefix: str) -> None:
        model, state_dict = adapted(), state_dict_of(adapted())
        state_dict[f"{prefix}vit.layers.0.mlp.fc1.weight"] = torch.zeros(64, 32)
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"fc1\.weight.*overwrite the model"):
            set_peft_model_state_dict(model, state_dict)
        assert_unchanged(model, before)

    def test_prompts_of_another_dimension(self) -> None:
        model, state_dict = adapted(), state_dict_of(adapted())
        state_dict[KV] = torch.tensor(1.0)
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"kv_prompts' has shape \(\), but here it has \(4, 3, 8\)"):
            set_peft_model_state_dict(model, state_dict)
        assert_unchanged(model, before)

    def test_auto_peft_model(self, folder: Path, tmp_path: Path) -> None:
        tiny_vit().save_pretrained(tmp_path / "backbone")
        edit_config(folder, base_model_name_or_path=str(tmp_path / "backbone"))
        edit_tensors(folder, **{VISUAL: bad(float("nan"))})
        with pytest.raises(ValueError, match="NaN or infinite"):
            AutoPeftModel.from_pretrained(folder)


class Code:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("entrance", ["from_pretrained", "config", "load_adapter", "native", "auto"])
def test_code_in_a_pickle_is_never_run(entrance: str, folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    torch.save({VISUAL: Code(mark)}, folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    tiny_vit().save_pretrained(tmp_path / "backbone")
    edit_config(folder, base_model_name_or_path=str(tmp_path / "backbone"))
    entrances: dict[str, Callable[[], Any]] = {
        "from_pretrained": lambda: PeftModel.from_pretrained(tiny_vit(), folder),
        "config": lambda: PeftModel.from_pretrained(tiny_vit(), folder, config=PeftConfig.from_pretrained(folder)),
        "load_adapter": lambda: adapted().load_adapter(folder, "other"),
        "native": lambda: tiny_vit().load_adapter(str(folder)),
        "auto": lambda: AutoPeftModel.from_pretrained(folder),
    }
    with pytest.raises(Exception, match="no pickle is loaded|[Ww]eights[_ ]only|No such file"):
        entrances[entrance]()
    assert not mark.exists()
    torch.load(folder / "adapter_model.bin", weights_only=False)
    assert mark.exists()
