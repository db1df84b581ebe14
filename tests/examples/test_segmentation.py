"""Dense prediction: what is drawn, the head, and that prompts join in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model

from e2vpt_peft import E2VPTConfig

SCRIPT = "segmentation.py"


def test_every_pixel_has_its_class(load_script: Callable[[str], Any]) -> None:
    images, labels = load_script(SCRIPT).draw(4, 48, seed=0)
    assert (images.shape, labels.shape) == ((4, 3, 48, 48), (4, 48, 48))
    assert images.min() >= -1 and images.max() <= 1
    assert all(set(label.unique().tolist()) <= {0, 1, 2, 3} and (label > 0).any() for label in labels)


def test_logits_of_a_pixel_come_from_its_patch(load_script: Callable[[str], Any]) -> None:
    model = load_script(SCRIPT).load_model().eval()
    images = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        states = model.vit(images, interpolate_pos_encoding=True).last_hidden_state[0, 1:]
        logits = model(images).logits[0]
    patch = model.config.patch_size
    row, column = 3, 5
    expected = model.head(states[row * (48 // patch) + column]).view(4, patch, patch)
    rows, columns = slice(row * patch, (row + 1) * patch), slice(column * patch, (column + 1) * patch)
    torch.testing.assert_close(logits[:, rows, columns], expected)


@pytest.mark.parametrize("depth", ["deep", "shallow"])
def test_prompts_change_no_shape(depth: str, load_script: Callable[[str], Any]) -> None:
    model = get_peft_model(load_script(SCRIPT).load_model(), E2VPTConfig(visual_prompt_depth=depth))
    assert model(pixel_values=torch.randn(2, 3, 48, 36)).logits.shape == (2, 4, 48, 36)


def test_both_are_trained_and_judged(load_script: Callable[[str], Any]) -> None:
    results = load_script(SCRIPT).main(["--train_images=16", "--test_images=8", "--epochs=1", "--size=24"])
    assert list(results) == ["linear head", "with E²VPT"]
    assert all(0 < iou < 1 for iou in results.values())
