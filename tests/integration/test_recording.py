"""A training step and an inference can be recorded as a CUDA graph: they copy nothing from the CPU and read nothing
back. The meta device stands in for the GPU, and refuses to give a value."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from e2vpt_peft import E2VPTConfig, keep_prefixes

from ..support.models import tiny_dinov2, tiny_vit

PRUNED = {"token_mask": [True, True, False, True], "segment_mask": [[True, False], [True, True]] * 2}
KINDS: dict[str, dict[str, Any]] = {
    "deep": {"prompt_dropout": 0.1, "kv_prompt_dropout": 0.1},
    "shallow": {"visual_prompt_depth": "shallow", "prompt_dropout": 0.1},
    "pruned": PRUNED,
    "pruned, shallow": {"visual_prompt_depth": "shallow", **PRUNED},
    "separate keys and values": {"share_kv_prompts": False},
}


class OnTheCPU(TorchDispatchMode):
    """Notes the operations that take or give a tensor on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves([args, kwargs, result]) if isinstance(leaf, torch.Tensor)]
        if any(tensor.device.type == "cpu" for tensor in tensors):
            self.operations.append(str(operation))
        return result


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("backbone", [tiny_vit, tiny_dinov2])
@pytest.mark.parametrize("size", [16, 24], ids=["", "other position embeddings"])
def test_nothing_goes_to_the_gpu_or_comes_back(backbone: Any, size: int, kind: dict[str, Any]) -> None:
    config = E2VPTConfig(num_visual_prompts=4, num_segments=2, modules_to_save=["classifier"], **kind)
    model = get_peft_model(backbone(), config).to("meta").train()
    keep_prefixes(model, False)  # as while a graph is recorded
    pixels, labels = torch.empty(2, 3, size, size, device="meta"), torch.empty(2, dtype=torch.long, device="meta")
    options = {"interpolate_pos_encoding": True} if backbone is tiny_vit else {}
    with OnTheCPU() as training:
        F.cross_entropy(model(pixel_values=pixels, **options).logits, labels).backward()
    with OnTheCPU() as inference, torch.inference_mode():
        model.eval()(pixel_values=pixels, **options)
    assert training.operations == inference.operations == []
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None for parameter in trained)
