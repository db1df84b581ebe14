"""Backbones of the accuracy benchmark: the size of the input, precision, and the one that is made of a package."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModel, Dinov2Config, Dinov2Model, SwinConfig, SwinForImageClassification

from examples.benchmarks import focus_backbone
from examples.benchmarks.accuracy import backbones, training


@pytest.fixture
def dinov2(tmp_path: Path) -> Any:
    """A random DINOv2 for 56 x 56 pixels, two layers of 64, saved in float16."""
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=1, mlp_ratio=2, patch_size=14, image_size=56
    )
    model = Dinov2Model(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    torch.nn.init.zeros_(model.embeddings.mask_token)
    model.half().save_pretrained(tmp_path / "dinov2")
    return SimpleNamespace(folder=str(tmp_path / "dinov2"), model=model.float().eval())


def test_positions_are_resized_once_and_weights_are_float32(dinov2: Any) -> None:
    found = backbones.build(dinov2.folder, 3, seed=0, image_size=28, attention="eager")
    assert {p.dtype for p in found.parameters()} == {torch.float32}
    assert found.config._attn_implementation == "eager" and found.config.image_size == 28
    table, before = found.dinov2.embeddings.position_embeddings, dinov2.model.embeddings.position_embeddings
    grid = before[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, (2, 2), mode="bicubic", antialias=True).permute(0, 2, 3, 1).flatten(1, 2)
    torch.testing.assert_close(table, torch.cat([before[:, :1], expected], dim=1))
    assert found(pixel_values=torch.randn(2, 3, 28, 28)).logits.shape == (2, 3)
    same = backbones.build(dinov2.folder, 3, seed=0, image_size=56)
    torch.testing.assert_close(same.dinov2.embeddings.position_embeddings, before)


def test_a_vit_takes_the_new_size(tiny_backbone: str) -> None:
    assert backbones.build(tiny_backbone, 3, 0, 24)(pixel_values=torch.randn(1, 3, 24, 24)).logits.shape == (1, 3)


def test_sizes_that_do_not_fit_are_refused(tiny_backbone: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="image_size=20 must be a multiple of the size of a patch, 8"):
        backbones.build(tiny_backbone, 3, 0, 20)
    SwinForImageClassification(SwinConfig(embed_dim=8, depths=[1], num_heads=[1])).save_pretrained(tmp_path / "swin")
    with pytest.raises(ValueError, match="SwinForImageClassification has no table of positions"):
        backbones.build(str(tmp_path / "swin"), 3, 0, 64)


def test_a_training_runs_in_the_precision_that_was_asked_for(tiny_backbone: str) -> None:
    from examples.benchmarks.accuracy.images import Images

    images = Images(torch.zeros(4, 3, 16, 16, dtype=torch.uint8), torch.zeros(4, dtype=torch.long))
    preprocessing = training.Preprocessing(16, torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1))
    for precision, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        model = backbones.build(tiny_backbone, 3, 0)
        seen: list[torch.dtype] = []
        model.classifier.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output.dtype))
        training.train(model, images, preprocessing, training.Optimisation("adamw", 1e-3, 0, 1, 4, 0, precision))
        training.accuracy(model, images, preprocessing, precision)
        training.features(model, images, preprocessing, precision)
        assert seen == [dtype] * 3
        assert {p.dtype for p in model.parameters()} == {torch.float32}


def export(model: Any, folder: str, path: Path) -> None:
    """Write a backbone the way that of the package was exported: only what it reads of such a file."""
    onnx = pytest.importorskip("onnx")
    tensors: dict[str, Any] = {"decoder.upconv1.weight": torch.ones(2, 2)}
    nodes = []
    for name, value in load_file(f"{folder}/model.safetensors").items():
        module, _, kind = name.rpartition(".")
        if name == "embeddings.position_embeddings":
            tensors["onnx::Concat_1"], tensors["onnx::Reshape_2"] = value[:, :1], value[:, 1:]
        elif kind == "weight" and value.dim() == 2:
            anonymous = f"onnx::MatMul_{100 + len(nodes)}"
            tensors[anonymous] = value.T.contiguous()
            parts = f"backbone.{module}".replace("layer.", "layer_")  # the index stays with the list
            path_of = "/" + parts.replace(".", "/").replace("layer_", "layer.") + "/MatMul"
            nodes.append(onnx.helper.make_node("MatMul", ["x", anonymous], ["y"], name=path_of))
        elif name != "embeddings.mask_token":
            tensors[f"backbone.{name}"] = value
    nodes.append(onnx.helper.make_node("MatMul", ["x", "y"], ["z"], name="/backbone/attention/MatMul"))
    arrays = [onnx.numpy_helper.from_array(value.float().numpy(), name) for name, value in tensors.items()]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], [], arrays)), path)


def test_the_backbone_of_the_package_is_what_was_exported(
    dinov2: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(dinov2.model, dinov2.folder, tmp_path / "focus.onnx")
    focus_backbone.main([f"--output_dir={tmp_path / 'made'}", f"--onnx={tmp_path / 'focus.onnx'}"])
    made = AutoModel.from_pretrained(tmp_path / "made", dtype=torch.float32).eval()
    images = torch.randn(2, 3, 56, 56)
    assert torch.equal(made(images).last_hidden_state, dinov2.model(images).last_hidden_state)
    number = sum(p.numel() for p in made.parameters())
    assert f"Saved {number:,} parameters" in capsys.readouterr().out
    assert load_file(tmp_path / "made" / "model.safetensors")["layernorm.weight"].dtype == torch.float16


def test_a_file_of_another_kind_is_refused(dinov2: Any, tmp_path: Path) -> None:
    export(dinov2.model, dinov2.folder, tmp_path / "focus.onnx")
    tensors, products = focus_backbone.read(tmp_path / "focus.onnx")
    weights = focus_backbone.convert(tensors, products[1:-1])
    with pytest.raises(ValueError, match="The weights do not fit: .*weight"):
        focus_backbone.build(weights)
    del tensors["onnx::Concat_1"]
    with pytest.raises(ValueError, match="positions of the class token and of the patches, not 1 tensors"):
        focus_backbone.convert(tensors, products)
