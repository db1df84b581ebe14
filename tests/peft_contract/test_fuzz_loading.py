"""Random damage to saved adapters and random configurations: refused in words, or harmless.

`E2VPT_FUZZ_EXAMPLES=20000 pytest tests/peft_contract/test_fuzz_loading.py` tries more of them than a test run does.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save

from e2vpt_peft import E2VPTConfig

from ..support.models import tiny_vit
from .common import adapted, assert_unchanged, logits, snapshot

EXAMPLES = int(os.environ.get("E2VPT_FUZZ_EXAMPLES", "50"))
fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    derandomize="E2VPT_FUZZ_EXAMPLES" not in os.environ,
    database=None,
)
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Saved:
    """A saved adapter, its bytes, and a model with another adapter to load it into."""

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            adapted().save_pretrained(folder)
            self.weights = (Path(folder) / WEIGHTS).read_bytes()
            self.config = json.loads((Path(folder) / CONFIG).read_text())
            self.tensors = load_file(Path(folder) / WEIGHTS)
        self.header = 8 + int.from_bytes(self.weights[:8], "little")
        self.renew()

    def renew(self) -> None:
        self.model = adapted(adapter_name="first")
        self.before, self.logits = snapshot(self.model), logits(self.model)

    def load(self, weights: bytes, config: Any) -> None:
        """Load what may be damaged: it is refused and the model is what it was, or it does no harm."""
        try:
            self._load(weights, config)
        except BaseException:  # the model may be spoilt for the next example
            self.renew()
            raise

    def _load(self, weights: bytes, config: Any) -> None:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (Path(folder) / WEIGHTS).write_bytes(weights)
            (Path(folder) / CONFIG).write_text(json.dumps(config))
            try:
                self.model.load_adapter(folder, "other")
            except (ValueError, TypeError) as error:
                assert str(error)
                event("refused")
                assert_unchanged(self.model, self.before)
                return
            except (KeyError, RuntimeError) as error:  # PEFT's own, about the head
                assert "classifier" in str(error), error
                event("refused by PEFT")
            else:
                event("loaded")
            assert torch.equal(logits(self.model), self.logits)  # of the other adapter, through the same backbone
            self.model.delete_adapter("other")
            assert_unchanged(self.model, self.before)


@pytest.fixture(scope="module")
def saved() -> Saved:
    return Saved()


@fuzz
@given(data=st.data())
def test_damaged_bytes(saved: Saved, data: st.DataObject) -> None:
    content = bytearray(saved.weights)
    for _ in range(data.draw(st.integers(1, 4))):
        # Mostly in the header, which is a small part of a real file.
        at = data.draw(st.one_of(st.integers(0, saved.header - 1), st.integers(0, len(saved.weights) - 1)))
        match data.draw(st.sampled_from(["flip", "byte", "cut", "drop", "insert", "repeat"])):
            case "flip" if at < len(content):
                content[at] ^= 1 << data.draw(st.integers(0, 7))
            case "byte" if at < len(content):
                content[at] = data.draw(st.integers(0, 255))
            case "cut":
                del content[at:]
            case "drop":
                del content[at : at + data.draw(st.integers(1, 64))]
            case "insert":
                content[at:at] = data.draw(st.binary(max_size=16))
            case "repeat":
                content[at:at] = content[at : at + data.draw(st.integers(1, 64))]
    saved.load(bytes(content), saved.config)


values = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.integers(-2, 20), st.floats(), st.text(max_size=8), st.just(2**70)
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=6,
)
shapes = st.lists(st.integers(0, 33), max_size=5)
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool])


@fuzz
@given(data=st.data())
def test_other_tensors(saved: Saved, data: st.DataObject) -> None:
    tensors = dict(saved.tensors)
    for _ in range(data.draw(st.integers(1, 3))):
        if not tensors:
            break
        name = data.draw(st.sampled_from(sorted(tensors)))
        match data.draw(st.sampled_from(["drop", "rename", "swap", "shape", "dtype", "value", "add"])):
            case "drop":
                del tensors[name]
            case "rename":
                at = data.draw(st.integers(0, len(name)))
                tensors[name[:at] + data.draw(st.text(max_size=4)) + name[at + 1 :]] = tensors.pop(name)
            case "swap":
                other = data.draw(st.sampled_from(sorted(tensors)))
                tensors[name], tensors[other] = tensors[other], tensors[name]
            case "shape":
                tensors[name] = torch.zeros([min(size, 9) for size in data.draw(shapes)])
            case "dtype":
                tensors[name] = tensors[name].to(data.draw(dtypes))
            case "value":
                tensors[name] = tensors[name].clone()
                tensors[name].view(-1)[:1] = data.draw(st.floats(width=16))
            case "add":
                known = [key.partition("base_model.model.")[2] for key in saved.before["state"]]
                names = st.one_of(st.text(max_size=8), st.sampled_from(known))
                added = data.draw(st.sampled_from(["", "base_model.model."])) + data.draw(names)
                tensors[added] = torch.ones(data.draw(shapes))
    saved.load(save({name: tensor.clone() for name, tensor in tensors.items()}), saved.config)


@fuzz
@given(data=st.data())
def test_other_configurations(saved: Saved, data: st.DataObject) -> None:
    config = dict(saved.config)
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(set(saved.config) - {"peft_type"})))
        if data.draw(st.booleans()):
            config[name] = data.draw(values)
        else:
            config.pop(name, None)
    saved.load(saved.weights, config)


fields: dict[str, Any] = {
    "num_visual_prompts": st.one_of(values, st.integers(0, 4)),
    "visual_prompt_depth": st.one_of(values, st.sampled_from(["deep", "shallow"])),
    "num_kv_prompts": st.one_of(values, st.integers(0, 4)),
    "share_kv_prompts": st.one_of(values, st.booleans()),
    "init_weights": st.one_of(values, st.sampled_from(["kaiming_uniform", "trunc_normal"])),
    "prompt_dropout": st.one_of(values, st.floats(0, 1)),
    "num_segments": st.one_of(values, st.sampled_from([1, 2, 16, 32])),
    "target_modules": st.one_of(values, st.sampled_from([["attention"], ".*attention", ["q_proj"], ["vit"]])),
    "exclude_modules": st.one_of(values, st.sampled_from([["layers.1.attention"], ".*1.*"])),
    "layers_to_transform": st.one_of(values, st.lists(st.integers(-1, 3), max_size=3)),
    "layers_pattern": st.one_of(values, st.sampled_from(["layers", ["layers"]])),
    "modules_to_save": st.one_of(values, st.sampled_from([["classifier"], ["layernorm"], ["nothing"]])),
    "attention_norm": st.one_of(values, st.sampled_from(["layernorm_before", "none", "forward", "0", "mlp"])),
    "num_special_tokens": st.one_of(values, st.integers(0, 20)),
    "backbone": st.one_of(values, st.fixed_dictionaries({"hidden_size": st.one_of(values, st.just(32))})),
    "token_mask": st.one_of(values, st.lists(st.booleans(), max_size=4)),
    "segment_mask": st.one_of(values, st.lists(st.lists(st.booleans(), min_size=2, max_size=2), max_size=3)),
}


@fuzz
@given(given_fields=st.fixed_dictionaries({}, optional=fields))
def test_random_configurations(given_fields: dict[str, Any], tmp_path: Path) -> None:
    """Refused by the configuration, or by the tuner and the backbone is what it was, or they work and are loaded."""
    try:
        config = E2VPTConfig(**given_fields)
    except (ValueError, TypeError) as error:
        assert str(error)
        event("refused by the configuration")
        return
    if config.num_visual_prompts + config.num_kv_prompts > 100:
        return
    backbone = tiny_vit()
    before = snapshot(backbone)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = get_peft_model(backbone, config).eval()
        except (ValueError, TypeError) as error:
            assert str(error)
            event("refused by the tuner")
            assert_unchanged(backbone, before)
            return
        event("works")
        model.save_pretrained(tmp_path)
        assert torch.equal(logits(PeftModel.from_pretrained(tiny_vit(), tmp_path)), logits(model))
