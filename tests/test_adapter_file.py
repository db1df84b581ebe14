from __future__ import annotations

from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from peft import PeftModel
from safetensors.torch import save_file

from e2vpt_peft import E2VPTConfig, adapter_file
from e2vpt_peft.adapter_file import check_adapter_file
from e2vpt_peft.prompt_shapes import KV_PROMPTS, SEGMENT_MASK, VISUAL_PROMPTS
from e2vpt_peft.saved_weights import ExpectedWeights

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

    def test_a_configuration_may_stand_alone_unless_an_adapter_was_saved_with_it(self, tmp_path: Path) -> None:
        (tmp_path / CONFIG).write_text("{}")
        assert check_adapter_file(EXPECTED, str(tmp_path)) is None
        with pytest.raises(ValueError, match=f"has the configuration of a saved adapter, but no {WEIGHTS}: copy it"):
            check_adapter_file(EXPECTED._replace(must_exist=True), str(tmp_path))

    def test_the_header_is_what_the_caller_gets(self, tmp_path: Path) -> None:
        saved_weights = check_adapter_file(EXPECTED, saved(tmp_path, prompts()))
        assert saved_weights is not None
        assert saved_weights.file == str(tmp_path / WEIGHTS)
        assert saved_weights.shapes == {name: tuple(value.shape) for name, value in prompts().items()}

    def test_more_tensors_than_any_adapter_has_are_refused_before_they_are_looked_at(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(adapter_file, "MAX_TENSORS", 5)
        with pytest.raises(ValueError, match=r"has 6 tensors\. Up to 5 are read"):
            check_adapter_file(EXPECTED, saved(tmp_path, prompts()))

    def test_a_head_that_is_not_a_number_or_complex_is_refused_and_infinite_buffers_are_not(
        self, tmp_path: Path
    ) -> None:
        nan, infinite = torch.full((5,), float("nan")), torch.full((5,), float("inf"))
        with pytest.raises(ValueError, match="5 of 5 values of 'classifier.bias' are NaN"):
            check_adapter_file(EXPECTED, saved(tmp_path, {**prompts(), "classifier.bias": nan}))
        with pytest.raises(ValueError, match="'classifier.bias' has type C64, but weights are real"):
            check_adapter_file(EXPECTED, saved(tmp_path, {**prompts(), "classifier.bias": nan.to(torch.complex64)}))
        check_adapter_file(EXPECTED, saved(tmp_path, {**prompts(), "classifier.mask": infinite}))

    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float64, torch.bfloat16])
    def test_prompts_of_any_precision_pass_and_nan_is_found_in_all(self, dtype: torch.dtype, tmp_path: Path) -> None:
        tensors = {name: value.to(dtype) for name, value in prompts().items()}
        check_adapter_file(EXPECTED, saved(tmp_path, tensors))
        tensors[f"layers.0.{KV_PROMPTS}"] = torch.full(SHAPES[KV_PROMPTS], float("nan")).to(dtype)
        with pytest.raises(ValueError, match="96 of 96 values"):
            check_adapter_file(EXPECTED, saved(tmp_path, tensors))

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
    @pytest.mark.parametrize("error", [EntryNotFoundError, RemoteEntryNotFoundError])
    def test_a_repository_without_weights_has_a_configuration_alone(
        self, error: type, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls = answers(monkeypatch, not_found(error))
        assert check_adapter_file(EXPECTED, "user/flowers") is None
        assert [name for _, name, _ in calls] == [WEIGHTS, PICKLE]
        with pytest.raises(
            ValueError, match="user/flowers.* has the configuration of a saved adapter, but no adapter"
        ):
            check_adapter_file(EXPECTED._replace(must_exist=True), "user/flowers")

    def test_a_hub_that_does_not_answer_does_not_turn_the_check_off(self, monkeypatch: pytest.MonkeyPatch) -> None:
        answers(monkeypatch, LocalEntryNotFoundError("403"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        with pytest.raises(ValueError, match=f"'{WEIGHTS}' of user/flowers cannot be checked, .*: try again"):
            check_adapter_file(EXPECTED, "user/flowers")
        assert check_adapter_file(EXPECTED, "user/flowers", None, {"local_files_only": True}) is None
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # PEFT looks into the cache alone as well
        assert check_adapter_file(EXPECTED, "user/flowers") is None

    @pytest.mark.parametrize(
        "error",
        [
            OSError(28, "No space left on device"),
            PermissionError(13, "denied"),
            TypeError("a mistake"),
            RepositoryNotFoundError.__new__(RepositoryNotFoundError, "404"),
            RevisionNotFoundError.__new__(RevisionNotFoundError, "404"),
            HFValidationError("no name"),
        ],
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
        shapes=[{VISUAL_PROMPTS: (24,), KV_PROMPTS: (2, 4, 3, 8), SEGMENT_MASK: (2, 16)}],
        num_layers=3,
        modules_to_save=["classifier"],
        in_all_layers=True,
        segment_mask=masks["segment_mask"],
    )
    config.backbone = None
    assert config._expected_weights().num_layers is None
    assert config._expected_weights().shapes[0][KV_PROMPTS] == (2, 0, 3, 0)
