"""Several adapters are trained, and answer a mixed batch as they answer alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

SCRIPT = "many_adapters.py"


def test_training_one_adapter_leaves_the_others(load_script: Callable[[str], Any]) -> None:
    script = load_script(SCRIPT)
    model = script.make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images, digits = script.load_images(model.config.image_size)
    script.train(model, "even", *script.TASKS["even"](images[:32], digits[:32]), epochs=1)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(".even" in name for name in changed)


def test_a_mixed_batch_is_answered_for_every_task(
    load_script: Callable[[str], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    script = load_script(SCRIPT)
    accuracy = script.main(["--train_images=32", "--test_images=10", "--epochs=1"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-3:]] == list(accuracy) == list(script.TASKS)


def test_every_other_image_is_turned(load_script: Callable[[str], Any]) -> None:
    script = load_script(SCRIPT)
    images = torch.arange(2 * 4.0).view(2, 1, 2, 2)
    turned, labels = script.upside_down(images, torch.zeros(2))
    assert labels.tolist() == [0, 1]
    assert torch.equal(turned[0], images[0])
    assert turned[1].flatten().tolist() == [7, 6, 5, 4]
