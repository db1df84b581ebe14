from __future__ import annotations

from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from peft import PeftModel
from safetensors.torch import save_file

from e2vpt_peft import E2VPTConfig, adapter_file
from e2vpt_peft.adapter_file import ExpectedWeights, check_adapter_file, check_finite, check_names
from e2vpt_peft.prompt_shapes import KV_PROMPTS, VISUAL_PROMPTS

from .peft_contract.common import adapted
from .support.adapted import adapt, inputs, make, tensors

WEIGHTS, PICKLE, CONFIG = "adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"
SHAPES = {VISUAL_PROMPTS: (2, 32), KV_PROMPTS: (4, 3, 8)}
EXPECTED = ExpectedWeights([SHAPES], num_layers=3, modules_to_save=["classifier"])


def prompts(layers: int = 3, **shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    shapes = {**SHAPES, **shapes}
    return {f"layers.{layer}.{name}": torch.ones(shape) for layer in range(layers) for name, shape in shapes.items()}


def saved(folder: Path, tensors: dict[str, torch.Tensor]) -> str:
    """A folder that is a local adapter for PEFT, with these weights."""
    (folder / CONFIG).write_text("{}")
    save_file(tensors, folder / WEIGHTS)
    return str(folder)


class TestLocalFiles:
    def test_what_the_configuration_says_passes(self, tmp_path: Path) -> None:
        check_adapter_file(EXPECTED, saved(tmp_path, {**prompts(), "classifier.weight": torch.ones(5, 32)}))
        check_adapter_file(EXPECTED, saved(tmp_path, prompts(layers=1)))  # an adapter of some of the layers

    def test_without_weights_there_is_nothing_to_check(self, tmp_path: Path) -> None:
        (tmp_path / CONFIG).write_text("{}")
        check_adapter_file(EXPECTED, str(tmp_path))

    def test_prompts_for_more_layers_than_the_backbone_has_are_refused(self, tmp_path: Path) -> None:
        folder = saved(tmp_path, prompts(layers=5))
        with pytest.raises(ValueError, match="prompts for 5 layers, .* with 3: 'layers.0', .* and 2 more"):
            check_adapter_file(EXPECTED, folder)
        check_adapter_file(EXPECTED._replace(num_layers=None), folder)

    def test_sizes_that_are_not_known_may_be_any_but_counts_may_not(self, tmp_path: Path) -> None:
        unknown = EXPECTED._replace(shapes=[{VISUAL_PROMPTS: (2, 0), KV_PROMPTS: (0, 3, 0)}])
        check_adapter_file(unknown, saved(tmp_path, prompts(**{VISUAL_PROMPTS: (2, 7), KV_PROMPTS: (1, 3, 9)})))
        with pytest.raises(ValueError, match=r"shape \(3, 7\), .* should be \(2, any\)\."):
            check_adapter_file(unknown, saved(tmp_path, prompts(**{VISUAL_PROMPTS: (3, 7)})))

    def test_any_of_several_sizes_will_do(self, tmp_path: Path) -> None:
        several = EXPECTED._replace(shapes=[SHAPES, {**SHAPES, VISUAL_PROMPTS: (2, 64)}])
        for size in (32, 64):
            check_adapter_file(several, saved(tmp_path, prompts(**{VISUAL_PROMPTS: (2, size)})))
        with pytest.raises(ValueError, match=r"should be \(2, 32\) or \(2, 64\)\."):
            check_adapter_file(several, saved(tmp_path, prompts(**{VISUAL_PROMPTS: (2, 48)})))

    def test_a_safetensors_file_is_taken_before_a_pickle(self, tmp_path: Path) -> None:
        (tmp_path / PICKLE).write_bytes(b"never read")
        check_adapter_file(EXPECTED, saved(tmp_path, prompts()))
        (tmp_path / WEIGHTS).unlink()
        with pytest.raises(ValueError, match=f"{PICKLE} is a pickle, which can hide code"):
            check_adapter_file(EXPECTED, str(tmp_path))

    def test_a_subfolder_is_looked_into(self, tmp_path: Path) -> None:
        (tmp_path / "flowers").mkdir()
        saved(tmp_path / "flowers", prompts(layers=5))
        with pytest.raises(ValueError, match="prompts for 5 layers"):
            check_adapter_file(EXPECTED, str(tmp_path), "flowers")


def answers(monkeypatch: pytest.MonkeyPatch, outcome: Any) -> list[Any]:
    """The Hub gives this file, or this error; all calls are noted."""
    calls: list[Any] = []

    def download(repository: str, name: str, **options: Any) -> str:
        calls.append((repository, name, options))
        if isinstance(outcome, BaseException):
            raise outcome
        if name not in outcome:
            raise EntryNotFoundError("404")
        return str(outcome[name])

    monkeypatch.setattr(adapter_file, "hf_hub_download", download)
    return calls


def config_on_the_hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    @wraps(hf_hub_download)  # PEFT reads its signature
    def download(*args: Any, **kwargs: Any) -> str:
        return str(folder / CONFIG)

    monkeypatch.setattr("peft.config.hf_hub_download", download)


def not_found(error: type) -> BaseException:
    return error.__new__(error, "404")  # some of them want a response, which the check does not look at


class TestDownloads:
    @pytest.mark.parametrize(
        "error",
        [
            EntryNotFoundError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
            HFValidationError,
        ],
    )
    def test_what_is_not_there_is_for_peft_to_say(self, error: type, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = answers(monkeypatch, not_found(error))
        check_adapter_file(EXPECTED, "user/flowers")
        assert [name for _, name, _ in calls] == [WEIGHTS, PICKLE]

    @pytest.mark.parametrize(
        "error", [OSError(28, "No space left on device"), PermissionError(13, "denied"), TypeError("a mistake")]
    )
    def test_a_download_that_fails_does_not_turn_the_check_off(
        self, error: Exception, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        answers(monkeypatch, error)
        with pytest.raises(type(error)) as raised:
            check_adapter_file(EXPECTED, "user/flowers")
        assert raised.value is error

    def test_a_full_disk_is_seen_by_whoever_loads_an_adapter(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        adapted().save_pretrained(tmp_path)
        answers(monkeypatch, OSError(28, "No space left on device"))
        config_on_the_hub(monkeypatch, tmp_path)
        with pytest.raises(OSError, match="No space left on device"):
            E2VPTConfig.from_pretrained("user/flowers")

    def test_what_was_downloaded_is_checked(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        saved(tmp_path, prompts(layers=5))
        answers(monkeypatch, {WEIGHTS: tmp_path / WEIGHTS})
        with pytest.raises(ValueError, match="prompts for 5 layers"):
            check_adapter_file(EXPECTED, "user/flowers")
        answers(monkeypatch, {PICKLE: tmp_path / PICKLE})
        with pytest.raises(ValueError, match="is a pickle"):
            check_adapter_file(EXPECTED, "user/flowers")

    def test_the_file_is_the_one_that_was_asked_for(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        adapted().save_pretrained(tmp_path)
        calls = answers(monkeypatch, {WEIGHTS: tmp_path / WEIGHTS})
        config_on_the_hub(monkeypatch, tmp_path)
        E2VPTConfig.from_pretrained("user/flowers", subfolder="roses", revision="v2", token="secret")
        assert calls == [
            ("user/flowers", WEIGHTS, {"subfolder": "roses", "revision": "v2", "token": "secret"}),
        ]


def test_a_backbone_of_several_sizes_has_files_of_several_shapes(tmp_path: Path) -> None:
    model = adapt(make("swin"))
    expected = model.peft_config["default"]._expected_weights()
    assert {shapes[VISUAL_PROMPTS] for shapes in expected.shapes} == {(3, 16), (3, 32)}
    assert expected.num_layers == 3
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make("swin"), tmp_path)
    assert torch.equal(tensors(loaded(**inputs("swin")))[0], tensors(model(**inputs("swin")))[0])


def test_what_a_configuration_expects_follows_from_its_masks() -> None:
    masks = {"token_mask": [True, False], "segment_mask": [[True] * 12 + [False] * 4, [False] * 16]}
    config = adapted(share_kv_prompts=False, **masks).peft_config["default"]
    assert config._expected_weights() == ExpectedWeights(
        [{VISUAL_PROMPTS: (24,), KV_PROMPTS: (2, 4, 3, 8)}], 3, ["classifier"]
    )
    config.backbone = None
    assert config._expected_weights().num_layers is None
    assert config._expected_weights().shapes[0][KV_PROMPTS] == (2, 0, 3, 0)


@pytest.mark.parametrize(
    ("names", "modules_to_save", "words"),
    [
        ([], None, "has no prompts, but nothing at all"),
        (["a", "b", "c", "d", "e"], None, "has no prompts, but 'a', 'b', 'c' and 2 more"),
        (["0.e2vpt_kv_prompts", "head.bias"], None, r"has 'head.bias', which .* modules_to_save=\[\]"),
        (["0.e2vpt_kv_prompts", "head.bias"], ["classifier"], r"has 'head.bias', .* modules_to_save=\['classifier'\]"),
        (["0.e2vpt_kv_prompts", "head.original_module.bias"], ["head"], "has 'head.original_module.bias', which"),
        (["0.e2vpt_kv_prompts", "base_layer.head.bias"], ["head"], "has 'base_layer.head.bias', which"),
    ],
)
def test_names_that_are_not_an_adapters_are_refused(names: list[str], modules_to_save: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"^here {words}"):
        check_names(names, modules_to_save, "here")


def test_names_of_prompts_and_of_the_modules_to_save_pass() -> None:
    check_names(["layers.0.e2vpt_visual_prompts"], None, "here")
    check_names(["layers.0.e2vpt_visual_prompts", "model.head.bias"], ["head"], "here")


def test_values_that_are_not_finite_are_counted() -> None:
    tensor = torch.tensor([1.0, float("nan"), float("inf")])
    with pytest.raises(ValueError, match="^here: 2 of 3 values of 'prompts' are NaN or infinite"):
        check_finite("prompts", tensor, "here")
    check_finite("prompts", tensor[:1], "here")
    check_finite("prompts", torch.empty(3, device="meta"), "here")
