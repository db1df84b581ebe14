from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import PeftModel, get_peft_model
from PIL import Image
from transformers import ViTForImageClassification, ViTImageProcessor

from e2vpt_peft import E2VPTConfig

from ..support.models import tiny_vit
from ..support.snippet import run_beside_an_image
from .common import adapted, card, snippet


def classifier(folder: Path, **labels: Any) -> PeftModel:
    """A model with an adapter, its backbone in a folder, and an image processor there."""
    tiny_vit(num_labels=5).save_pretrained(folder / "backbone")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "backbone")
    return adapted(ViTForImageClassification.from_pretrained(folder / "backbone", **labels))


class TestCode:
    @pytest.mark.parametrize("names", [["ant", 'bee "b"', "cat"], None], ids=["named", "unnamed"])
    def test_it_runs(self, names: list[str] | None, tmp_path: Path) -> None:
        labels: dict[str, Any] = {"num_labels": 3}
        if names is not None:
            labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
        model = classifier(tmp_path, ignore_mismatched_sizes=True, **labels)
        model.save_pretrained(tmp_path / "adapter")
        code = snippet(card(model, tmp_path / "adapter", base_model=str(tmp_path / "backbone")))
        answer = run_beside_an_image(code, folders=tmp_path)
        assert answer in (names or ["LABEL_0", "LABEL_1", "LABEL_2"])

    def test_it_takes_images_of_every_kind(self, tmp_path: Path) -> None:
        model = classifier(tmp_path)
        model.save_pretrained(tmp_path / "adapter")
        code = snippet(card(model, tmp_path / "adapter", base_model=str(tmp_path / "backbone")))
        levels = np.linspace(0, 1, 32 * 24, dtype=np.float32).reshape(24, 32)
        colour = Image.fromarray((levels * 255).astype(np.uint8)).convert("RGB")
        images = [colour.convert(mode) for mode in ("1", "L", "LA", "P", "RGBA", "CMYK")]
        images += [Image.fromarray((levels * 65535).astype(np.uint16)), Image.fromarray(levels)]
        assert [image.mode for image in images[-2:]] == ["I;16", "F"]
        # What the processor makes of grey levels is the same, however many bits they have.
        seen = code.replace("print(", "print(processor(image, return_tensors='pt')['pixel_values'].mean().item(), ")
        means = {
            image.mode: float(run_beside_an_image(seen, image, tmp_path).split()[0]) for image in [colour, *images]
        }
        for mode in ("L", "LA", "RGBA", "CMYK", "I;16", "F"):
            assert means[mode] == pytest.approx(means["RGB"], abs=0.01), mode

    def test_no_path_of_this_machine(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model = classifier(tmp_path)
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        model.save_pretrained("../flowers")
        for folder in (tmp_path / "flowers", Path("../flowers")):
            code = snippet(card(model, folder, base_model=str(tmp_path / "backbone")))
            assert '"path/to/flowers"' in code and '"path/to/backbone"' in code
            assert str(tmp_path) not in code and ".." not in code

    def test_it_runs_for_an_adapter_in_a_subfolder(self, tmp_path: Path) -> None:
        tiny_vit().vit.save_pretrained(tmp_path / "backbone")
        backbone = type(tiny_vit().vit).from_pretrained(tmp_path / "backbone")
        config = E2VPTConfig(num_visual_prompts=2, num_segments=4)
        model = get_peft_model(backbone, config, adapter_name="flowers")
        model.save_pretrained(tmp_path / "adapter")
        text = card(model, tmp_path / "adapter", base_model=str(tmp_path / "backbone"))
        assert run_beside_an_image(snippet(text), folders=tmp_path) == "" and "ViTModel" in text

    def test_many_classes_are_not_listed(self, tmp_path: Path) -> None:
        names = {index: f"class {index}" for index in range(50)}
        text = card(adapted(tiny_vit(num_labels=50, id2label=names)), tmp_path)
        assert "num_labels=50" in text and "class 7" not in text
