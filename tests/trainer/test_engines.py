"""What a Trainer has while an engine trains, and before and after; tests/distributed has the engines themselves."""

from __future__ import annotations

import importlib.metadata
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin

from e2vpt_peft.adapter import PromptedAdapter
from e2vpt_peft.trainer.engines import Engines

from .toy import adapted, taken


class Accelerator:
    """Counts how often what it holds is freed."""

    def __init__(self, **plugins: Any) -> None:
        self.state, self.freed = SimpleNamespace(**plugins), 0

    def free_memory(self) -> None:
        self.freed += 1


def trainer_with(engine: str | None, **plugins: Any) -> Any:
    model = adapted()
    return SimpleNamespace(
        is_fsdp_enabled=engine == "fsdp",
        is_deepspeed_enabled=engine == "deepspeed",
        model=model,
        model_wrapped=model,
        callback_handler=SimpleNamespace(model=model),
        deepspeed=None,
        optimizer=None,
        lr_scheduler=None,
        accelerator=Accelerator(**plugins),
        args=SimpleNamespace(device="meta", save_strategy="no"),
    )


def learn(trainer: Any) -> None:
    """What training leaves in a Trainer."""
    trainer.optimizer = trainer.lr_scheduler = trainer.deepspeed = object()
    trainer.callback_handler.model = trainer.model_wrapped = object()
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)


@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
def test_an_engine_has_a_copy_and_what_it_learns_comes_back(engine: str) -> None:
    trainer = trainer_with(engine)
    whole, before = trainer.model, taken(trainer.model)
    engines = Engines(trainer)
    assert not trainer.is_fsdp_enabled and not trainer.is_deepspeed_enabled
    with engines.sharded_copy(PromptedAdapter.find(whole)):
        assert getattr(trainer, f"is_{engine}_enabled")
        assert trainer.is_fsdp_enabled != trainer.is_deepspeed_enabled
        assert trainer.model is trainer.model_wrapped is not whole
        learn(trainer)
        assert all(torch.equal(tensor, before[name]) for name, tensor in taken(whole).items())
    assert not trainer.is_fsdp_enabled and not trainer.is_deepspeed_enabled
    assert trainer.model is trainer.model_wrapped is trainer.callback_handler.model is whole
    assert trainer.optimizer is trainer.lr_scheduler is trainer.deepspeed is None
    assert trainer.accelerator.freed == 1
    for name, tensor in taken(whole).items():
        assert torch.equal(tensor, before[name] if tensor.dtype == torch.bool else before[name] + 1)


def test_after_an_error_the_whole_model_is_back_and_has_learned_nothing() -> None:
    trainer = trainer_with("fsdp")
    whole, before = trainer.model, taken(trainer.model)
    with pytest.raises(FloatingPointError), Engines(trainer).sharded_copy(PromptedAdapter.find(whole)):
        learn(trainer)
        raise FloatingPointError
    assert trainer.model is trainer.model_wrapped is trainer.callback_handler.model is whole
    assert not trainer.is_fsdp_enabled and trainer.accelerator.freed == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in taken(whole).items())


def test_without_an_engine_there_is_no_copy() -> None:
    trainer = trainer_with(None)
    whole = trainer.model
    engines = Engines(trainer)
    with engines.sharded_copy(PromptedAdapter.find(whole)):
        assert trainer.model is whole
    engines.place_whole_model()  # that is Trainer's own business
    assert next(whole.parameters()).device.type == "cpu"
    assert trainer.accelerator.freed == 0


def test_the_whole_model_is_placed_while_no_engine_has_its_copy() -> None:
    trainer = trainer_with("fsdp")
    whole = trainer.model
    engines = Engines(trainer)
    with engines.sharded_copy(PromptedAdapter.find(whole)):
        engines.place_whole_model()
        assert next(trainer.model.parameters()).device.type == "cpu"
    engines.place_whole_model()
    assert next(whole.parameters()).device.type == "meta"


GOOD = {"fsdp_version": 2, "state_dict_type": "FULL_STATE_DICT", "cpu_ram_efficient_loading": False}


@pytest.mark.parametrize(
    ("engine", "plugin", "words"),
    [
        ("fsdp", {"fsdp_plugin": FullyShardedDataParallelPlugin(fsdp_version=2)}, ["FULL_STATE_DICT", "fsdp2.yaml"]),
        ("fsdp", {"fsdp_plugin": SimpleNamespace(**{**GOOD, "fsdp_version": 1})}, ["fsdp_version: 2"]),
        ("fsdp", {"fsdp_plugin": SimpleNamespace(**{**GOOD, "cpu_ram_efficient_loading": True})}, ["loading: false"]),
        ("deepspeed", {"deepspeed_plugin": SimpleNamespace(deepspeed_config={"scheduler": {}})}, ["'scheduler'"]),
    ],
)
def test_settings_that_cannot_work_are_refused(engine: str, plugin: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as raised:
        Engines(trainer_with(engine, **plugin)).check_settings()
    assert all(word in str(raised.value) for word in words)


@pytest.mark.parametrize(
    ("version", "strategy", "refused"),
    [("1.14.9", "epoch", True), ("1.14.9", "no", False), ("1.15.0", "epoch", False)],
)
def test_checkpoints_that_accelerate_cannot_load_are_refused(
    version: str, strategy: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    trainer = trainer_with("fsdp", fsdp_plugin=SimpleNamespace(**GOOD))
    trainer.args.save_strategy = strategy
    with pytest.raises(ValueError, match="before 1.15.*save_strategy='no'") if refused else nullcontext():
        Engines(trainer).check_settings()


def test_settings_that_work_are_not() -> None:
    Engines(trainer_with("fsdp", fsdp_plugin=SimpleNamespace(**GOOD))).check_settings()
    Engines(trainer_with("deepspeed", deepspeed_plugin=SimpleNamespace(deepspeed_config={}))).check_settings()
    Engines(trainer_with(None)).check_settings()


def test_a_search_with_such_settings_trains_nothing(tmp_path: Path) -> None:
    from .test_trainer import Trainings
    from .toy import make_trainer

    trainings = Trainings()
    trainer = make_trainer(tmp_path, callbacks=[trainings])
    trainer._engines = Engines(
        trainer_with("deepspeed", deepspeed_plugin=SimpleNamespace(deepspeed_config={"scheduler": {}}))
    )
    with pytest.raises(ValueError, match="'scheduler'"):
        trainer.train()
    assert not trainings.folders and not (tmp_path / "_pruning_state").exists()
