"""The pretraining script: what it draws, what it trains and what it saves."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTModel

pytest.importorskip("matplotlib")
pretrain_backbone = importlib.import_module("pretrain_backbone")

TINY = [
    "--steps=2", "--batch_size=8", "--invented_characters=4", "--image_size=16", "--patch_size=8", "--hidden_size=32",
    "--num_layers=2", "--num_heads=2", "--num_eval_images=8",
]  # fmt: skip


def draw(seed: int, number: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    task = pretrain_backbone.DrawnImages(24, invented_characters=8, seed=seed, characters="♥→★")
    return task.sample(number, torch.Generator().manual_seed(seed))


def test_images_depend_on_the_seed_alone() -> None:
    images, labels = draw(seed=0)
    torch.rand(3)  # the global generator must not matter
    again, labels_again = draw(seed=0)
    other, _ = draw(seed=1)
    assert torch.equal(images, again) and torch.equal(labels, labels_again)
    assert not torch.equal(images, other)


def test_images_are_pictures_of_every_class() -> None:
    images, labels = draw(seed=0, number=500)
    assert images.shape == (500, 3, 24, 24) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1
    assert set(labels.tolist()) == set(range(3 + 8 + pretrain_backbone.TEXTURES))
    assert (images.flatten(1).std(1) > 1e-3).all(), "an image is blank"


def test_no_letter_and_no_digit_is_drawn() -> None:
    assert not any(symbol.isalnum() for symbol in pretrain_backbone.SYMBOLS)


def test_kinds_are_symbols_invented_characters_and_textures() -> None:
    task = pretrain_backbone.DrawnImages(24, invented_characters=8, characters="♥→★")
    assert task.kinds.tolist() == [0] * 3 + [1] * 8 + [2] * pretrain_backbone.TEXTURES
    assert task.num_classes == len(task.kinds)


def test_patches_are_scored_on_classes_and_the_class_token_on_kinds() -> None:
    kinds = torch.tensor([0, 0, 1])
    of_classes = torch.zeros(2, 4, 3)  # two images of four patches
    of_classes[0, :3, 0] = 1  # three patches of four say class 0
    of_classes[0, 3, 1] = 2
    of_classes[1, :, 0] = 1
    of_kinds = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    shares = pretrain_backbone.right((of_classes, of_kinds), torch.tensor([0, 1]), kinds)
    assert shares.tolist() == [0.5, 0.5]


def test_every_character_has_several_fonts() -> None:
    characters = pretrain_backbone.SYMBOLS
    assert len(set(characters)) == len(characters)
    bank = pretrain_backbone.printed_characters(characters)
    assert len(bank) == len(characters)
    assert min(len(glyphs) for glyphs in bank) >= 4
    assert all((glyphs.flatten(1).sum(1) > 0).all() for glyphs in bank)


def test_invented_characters_keep_their_shape() -> None:
    """Two drawings of a character are nearer to each other than drawings of different characters, mostly."""
    script = pretrain_backbone.InventedScript(20, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    mean = torch.stack([script.draw(torch.full((32,), i), 24, generator).mean(0) for i in range(20)])
    again = torch.stack([script.draw(torch.full((32,), i), 24, generator).mean(0) for i in range(20)])
    nearest = torch.cdist(again.flatten(1), mean.flatten(1)).argmin(1)
    assert (nearest == torch.arange(20)).float().mean() > 0.8


def test_script_writes_a_backbone_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = pretrain_backbone.main([*TINY, f"--output_dir={tmp_path}"])
    assert all(0 <= score <= 1 for score in scores)
    printed = capsys.readouterr().out
    num_classes = len(pretrain_backbone.SYMBOLS) + 4 + pretrain_backbone.TEXTURES
    assert f"({num_classes} classes, by the patch tokens)" in printed
    assert "(3 kinds, by the class token)" in printed
    model = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=5)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    pixels = processor(PILImage.fromarray(picture), return_tensors="pt")["pixel_values"]
    expected = pretrain_backbone.normalise(torch.from_numpy(picture).permute(2, 0, 1)[None] / 255)
    torch.testing.assert_close(pixels, expected)
    assert model(pixel_values=pixels).logits.shape == (1, 5)


def test_same_seed_same_backbone(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        pretrain_backbone.main([*TINY, f"--seed={seed}", f"--output_dir={tmp_path / name}"])
    a, b, c = (ViTModel.from_pretrained(tmp_path / name, add_pooling_layer=False).state_dict() for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not all(torch.equal(a[key], c[key]) for key in a)


@pytest.mark.parametrize("held_out", [True, False], ids=["test file", "no test file"])
def test_real_images(tmp_path: Path, held_out: bool) -> None:
    generator = np.random.default_rng(0)
    pictures = [PILImage.fromarray(p) for p in generator.integers(0, 256, (20, 20, 18, 3), dtype=np.uint8)]
    features = Features({"image": Image(), "label": Value("int64")})
    data = Dataset.from_dict({"image": pictures, "label": [i % 4 for i in range(20)]}, features=features)
    data.to_parquet(tmp_path / "train.parquet")
    if held_out:
        data.to_parquet(tmp_path / "test.parquet")
    pretrain_backbone.main([*TINY, f"--data_dir={tmp_path}", f"--output_dir={tmp_path / 'out'}"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["image_size"] == 16
    task = pretrain_backbone.RealImages(str(tmp_path), 16)
    images, labels = task.sample(6, torch.Generator().manual_seed(0))
    assert task.num_classes == 4
    assert task.kinds.tolist() == [0, 1, 2, 3]
    assert len(task.images) == (20 if held_out else 18)
    assert images.shape == (6, 3, 16, 16) and images.min() >= 0 and images.max() <= 1 and labels.shape == (6,)


def test_no_parquet_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="No parquet file"):
        pretrain_backbone.RealImages(str(tmp_path), 16)
