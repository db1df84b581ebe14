"""Images of every kind to colour, the same in training and inference."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

WHITE_OF_INTEGERS = 65535
"""PIL has no mode for less than 32 bits but more than 8 that says so: what `I` holds are nearly always 16 bits."""
WHITES_OF_FLOATS = (1.0, 255.0, 65535.0)


def to_rgb(image: Image) -> Image:
    """Convert an image of any mode to RGB: grey, palette, with transparency, CMYK, 16-bit and float ones.

    PIL's own `convert("RGB")` cuts grey levels off at 255, so that a 16-bit image (X-ray, microscopy, depth) becomes
    white. Here they are scaled: 65535 is white in a 16-bit image; in one of floats white is the smallest of 1, 255
    and 65535 that no pixel exceeds. Photographs are turned upright by their EXIF data, as the `datasets` library does.
    Transparency is dropped.

    Args:
        image (`PIL.Image.Image`): The image. It is not changed.

    Returns:
        `PIL.Image.Image`: 8-bit RGB, the size of the image (after turning).

    Example:

        ```py
        >>> inputs = processor(to_rgb(Image.open("scan.tif")), return_tensors="pt")
        ```
    """
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.float64)
        white = float(WHITE_OF_INTEGERS)
        if image.mode == "F":
            levels = np.nan_to_num(levels)
            white = next((white for white in WHITES_OF_FLOATS if levels.max(initial=0) <= white), levels.max())
        image = Image.fromarray((levels.clip(0, white) * (255 / white)).round().astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # PIL warns of the direct way
    elif image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())  # PIL knows no direct way
    return image.convert("RGB")
