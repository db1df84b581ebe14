"""What an installed package must do, in a few seconds and without the source tree: `python -I tests/smoke.py`.

`make release-check` runs it on the wheel in an environment of its own.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
import tempfile
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import ViTConfig, ViTForImageClassification

import e2vpt_peft
from e2vpt_peft import E2VPTConfig, prune_prompts, score_prompts

FOLDER = Path(e2vpt_peft.__file__).parent
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def check_installation() -> None:
    source = Path(__file__).resolve().parents[1]
    assert not FOLDER.is_relative_to(source / "e2vpt_peft"), f"{FOLDER} is the source tree, not an installation"
    assert importlib.metadata.version("e2vpt-peft") == e2vpt_peft.__version__
    assert (FOLDER / "py.typed").is_file()
    for module in pkgutil.walk_packages(e2vpt_peft.__path__, "e2vpt_peft."):
        if not module.name.startswith("e2vpt_peft.plots"):  # needs the extra of that name
            importlib.import_module(module.name)


def backbone() -> ViTForImageClassification:
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, num_labels=3, **SIZES))


def check_adapter() -> None:
    config = E2VPTConfig(num_visual_prompts=4, num_kv_prompts=2, num_segments=4, modules_to_save=["classifier"])
    model = get_peft_model(backbone(), config)
    batch = {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([0, 2])}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = model(**batch).loss
    before.backward()
    optimizer.step()
    model.eval()
    assert model(**batch).loss < before
    prune_prompts(model, score_prompts(model, [batch]), token_rate=0.5, segment_rate=0.5)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(backbone(), folder).eval()
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits)


if __name__ == "__main__":
    check_installation()
    check_adapter()
    print(f"e2vpt_peft {e2vpt_peft.__version__} works from {FOLDER}")
