"""The web demo: what it loads, what it answers, and that over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from console import InputError
from peft import get_peft_model
from PIL import Image
from transformers import AutoModelForImageClassification

from e2vpt_peft import E2VPTConfig

pytest.importorskip("sklearn")
import demo


def save_adapter(folder: Path, backbone: str, labels: list[str], **config: Any) -> str:
    """An adapter with random prompts and head, as `image_classification.py` saves it."""
    model = AutoModelForImageClassification.from_pretrained(
        backbone, id2label=dict(enumerate(labels)), ignore_mismatched_sizes=True
    )
    settings = {"num_visual_prompts": 4, "num_kv_prompts": 2, "num_segments": 4, "modules_to_save": ["classifier"]}
    adapted = get_peft_model(model, E2VPTConfig(**{**settings, **config}))
    torch.nn.init.normal_(adapted.base_model.model.classifier.weight)
    adapted.save_pretrained(str(folder))
    model.config.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def folders(tiny_backbone: str, tmp_path: Path) -> list[str]:
    return [
        save_adapter(tmp_path / "insects", tiny_backbone, ["ant", "bee", "fly"]),
        save_adapter(tmp_path / "sizes", tiny_backbone, ["large", "small", demo.UNUSED], num_visual_prompts=7),
    ]


@pytest.fixture
def image() -> Image.Image:
    return Image.linear_gradient("L").resize((30, 20))


def test_each_adapter_answers_as_it_does_alone(folders: list[str], image: Image.Image) -> None:
    answers = demo.load(folders)
    found = answers(image)
    assert {name: list(answer) for name, answer in found.items()} == {
        "insects": ["ant", "bee", "fly"],
        "sizes": ["large", "small"],
    }
    for name, answer in found.items():
        assert sum(answer.values()) == pytest.approx(1)
        answers.model.set_adapter(name)
        logits = answers.model(**answers.inputs(image)).logits[0, : len(answer)]
        assert list(answer.values()) == pytest.approx(logits.softmax(-1).tolist(), abs=1e-5)


def test_all_adapters_answer_in_one_forward_pass(folders: list[str], image: Image.Image) -> None:
    answers, batches = demo.load(folders), []
    answers.model.get_base_model().vit.register_forward_pre_hook(
        lambda module, args, kwargs: batches.append(len(kwargs.get("pixel_values", args[0] if args else ()))),
        with_kwargs=True,
    )
    answers(image)
    assert batches == [2]


def test_adapters_that_cannot_share_a_batch(folders: list[str], tiny_backbone: str, tmp_path: Path) -> None:
    other = save_adapter(tmp_path / "more", tiny_backbone, ["a", "b", "c", "d"])
    with pytest.raises(InputError, match="same number of classes, but these .*'insects': 3, 'sizes': 3, 'more': 4"):
        demo.load([*folders, other])
    with pytest.raises(InputError, match="missing': there is no such folder"):
        demo.load([str(tmp_path / "missing")])


def test_the_page_answers_over_http(folders: list[str], image: Image.Image, tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed")
    client = pytest.importorskip("gradio_client", reason="gradio_client is not installed")
    answers = demo.load(folders)
    page = demo.build(answers, demo.digit_images(2))
    _, url, _ = page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    try:
        image.save(tmp_path / "image.png")
        *labels, picture = client.Client(url, verbose=False).predict(
            client.handle_file(tmp_path / "image.png"), "sizes", 1, api_name="/answer"
        )
    finally:
        page.close()
    for answer, expected in zip(labels, answers(image).values()):
        assert answer["label"] == max(expected, key=expected.__getitem__)
        shown = {one["label"]: one["confidence"] for one in answer["confidences"]}
        assert shown == pytest.approx(expected, abs=1e-4)
    assert picture["type"] == "matplotlib" and picture["plot"].startswith("data:image/")


def test_digits_have_named_classes(tmp_path: Path, image: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "train", lambda *_: None)
    answers = demo.load(demo.train_digits(tmp_path, epochs=1))
    assert {name: list(answer) for name, answer in answers(image).items()} == demo.LABELS
