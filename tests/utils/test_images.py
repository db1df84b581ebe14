from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from e2vpt_peft import to_rgb

STEPS = {
    "1": ["1"],
    "L": [],
    "LA": ["LA"],
    "La": ["LA", "La"],
    "P": ["RGB", "P"],
    "PA": ["RGB", "P", "PA"],
    "RGB": ["RGB"],
    "RGBA": ["RGBA"],
    "RGBa": ["RGBA", "RGBa"],
    "RGBX": ["RGBX"],
    "CMYK": ["RGB", "CMYK"],
    "YCbCr": ["RGB", "YCbCr"],
    "HSV": ["RGB", "HSV"],
}
"""How to get from a grey image to one of a mode."""


@pytest.mark.parametrize("mode", STEPS)
def test_8_bit_modes_keep_their_colours(mode: str) -> None:
    dark, bright = (0, 255) if mode == "1" else (51, 204)  # the palette has these
    image = Image.new("L", (5, 4), bright)
    image.paste(dark, (0, 0, 2, 4))
    for step in STEPS[mode]:
        image = image.convert(step)
    assert image.mode == mode
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = to_rgb(image)
    assert result.mode == "RGB" and result.size == (5, 4)
    pixels = np.asarray(result).astype(int)
    assert abs(pixels[:, :2] - dark).max() <= 2 and abs(pixels[:, 2:] - bright).max() <= 2


@pytest.mark.parametrize("mode", ["I", "I;16", "I;16B", "I;16L"])
def test_16_bits_are_scaled(mode: str, tmp_path: Path) -> None:
    levels = np.array([[0, 255, 3000, 60000, 65535]])
    image = Image.new(mode, (5, 1))
    for column, level in enumerate(levels[0].tolist()):
        image.putpixel((column, 0), level)
    assert np.asarray(to_rgb(image))[0, :, 1].tolist() == [0, 1, 12, 233, 255]
    if mode in ("I", "I;16"):
        image.save(tmp_path / "image.tif")
        assert np.asarray(to_rgb(Image.open(tmp_path / "image.tif")))[0, :, 1].tolist() == [0, 1, 12, 233, 255]


@pytest.mark.parametrize("white", [1.0, 255.0, 65535.0, 1e6])
def test_floats_are_scaled_by_the_usual_white_above_them(white: float) -> None:
    levels = np.array([[-1, 0, 0.2, 1, np.nan]], dtype=np.float32) * np.float32(white)
    assert np.asarray(to_rgb(Image.fromarray(levels)))[0, :, 0].tolist() == [0, 0, 51, 255, 0]


def test_black_stays_black() -> None:
    for mode in ("I;16", "F"):
        assert np.asarray(to_rgb(Image.new(mode, (2, 2)))).max() == 0


def test_palettes_with_transparency_convert_without_a_warning() -> None:
    image = Image.new("RGB", (4, 4), (10, 200, 30)).convert("P")
    image.info["transparency"] = bytes(range(256))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert to_rgb(image).getpixel((0, 0)) == image.convert("RGBA").getpixel((0, 0))[:3]  # type: ignore[index]


def test_photographs_are_turned_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (6, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    image.save(tmp_path / "photo.jpg", exif=exif)
    assert to_rgb(Image.open(tmp_path / "photo.jpg")).size == (4, 6)


def test_the_image_itself_is_not_changed() -> None:
    image = Image.new("RGBA", (3, 3), (1, 2, 3, 4))
    to_rgb(image)
    assert image.mode == "RGBA" and image.getpixel((0, 0)) == (1, 2, 3, 4)
