"""ONNX export, checked in onnxruntime against torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import nn

from e2vpt_peft import E2VPTConfig

from ..support.models import TINY_MODELS, images

REASON = "ONNX export is checked with onnx, onnxscript and onnxruntime, of which one is not installed"
pytest.importorskip("onnx", reason=REASON)
pytest.importorskip("onnxscript", reason=REASON)
onnxruntime = pytest.importorskip("onnxruntime", reason=REASON)

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class Logits(nn.Module):
    """What is exported: a model from an image to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=pixel_values).logits


@pytest.mark.parametrize(
    ("architecture", "attention", "visual_prompt_depth"),
    [
        ("vit", "sdpa", "deep"),
        ("vit", "sdpa", "shallow"),
        pytest.param("vit", "eager", "deep", marks=pytest.mark.slow),
        pytest.param("vit", "eager", "shallow", marks=pytest.mark.slow),
        pytest.param("deit", "sdpa", "shallow", marks=pytest.mark.slow),  # two special tokens
        pytest.param("dinov2", "sdpa", "deep", marks=pytest.mark.slow),
    ],
)
def test_onnxruntime_agrees_for_every_batch_size(
    architecture: str, attention: str, visual_prompt_depth: str, tmp_path: Path
) -> None:
    backbone = TINY_MODELS[architecture](attn_implementation=attention, num_hidden_layers=2)
    config = E2VPTConfig(num_visual_prompts=4, visual_prompt_depth=visual_prompt_depth, modules_to_save=["classifier"])
    model = get_peft_model(backbone, config).eval()
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        Logits(model).eval(),
        (images(2),),
        path,
        input_names=["pixel_values"],
        output_names=["logits"],
        dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch", min=1, max=64)}},
        dynamo=True,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size in (1, 2, 7):
        (logits,) = session.run(["logits"], {"pixel_values": images(size).numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(images(size)).logits, atol=1e-4, rtol=0)
