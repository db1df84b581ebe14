"""Image augmentation with PIL and torch's random numbers alone; torchvision is not needed.

All functions take and return a `PIL.Image.Image`. Random ones draw from `generator`, or from torch's global random
state, which `Trainer` seeds, gives to every worker of the data loader and restores when a run is resumed.
"""

from __future__ import annotations

import math

import torch
from PIL import Image

Size = tuple[int, int]
"""Height and width, in pixels."""


def _uniform(low: float, high: float, generator: torch.Generator | None) -> float:
    return low + (high - low) * torch.rand((), generator=generator).item()


def _integer(high: int, generator: torch.Generator | None) -> int:
    """A whole number from 0 to `high`, both included."""
    return int(torch.randint(high + 1, (), generator=generator).item())


def horizontal_flip(
    image: Image.Image, probability: float = 0.5, generator: torch.Generator | None = None
) -> Image.Image:
    """Mirror left and right, with a probability."""
    if _uniform(0, 1, generator) < probability:
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


def random_resized_crop(
    image: Image.Image,
    size: Size,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    resample: int = Image.Resampling.BILINEAR,
    generator: torch.Generator | None = None,
) -> Image.Image:
    """Cut out a part of random area, shape and place, and resize it.

    Args:
        image (`Image.Image`): The image.
        size (`tuple[int, int]`): Height and width of the result.
        scale (`tuple[float, float]`): Smallest and largest area of the part, as a share of the image.
        ratio (`tuple[float, float]`): Smallest and largest width of the part divided by its height.
        resample (`int`): PIL's interpolation.
        generator (`torch.Generator | None`): Where random numbers come from.
    """
    width, height = image.size
    for _ in range(10):
        area = width * height * _uniform(*scale, generator)
        shape = math.exp(_uniform(math.log(ratio[0]), math.log(ratio[1]), generator))
        part_width, part_height = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < part_width <= width and 0 < part_height <= height:
            left = _integer(width - part_width, generator)
            top = _integer(height - part_height, generator)
            break
    else:  # a very long or a tiny image: the largest part in the middle that has an allowed shape
        part_width = max(1, min(width, round(height * ratio[1])))
        part_height = max(1, min(height, round(width / ratio[0])))
        left, top = (width - part_width) // 2, (height - part_height) // 2
    box = (left, top, left + part_width, top + part_height)
    return image.resize((size[1], size[0]), resample, box=box)


def resize_shorter_side(image: Image.Image, size: Size, resample: int = Image.Resampling.BILINEAR) -> Image.Image:
    """Resize, keeping the shape, so that the image just covers `size` (height and width)."""
    width, height = image.size
    factor = max(size[1] / width, size[0] / height)
    larger = (max(size[1], round(width * factor)), max(size[0], round(height * factor)))
    return image.resize(larger, resample)


def random_crop(image: Image.Image, size: Size, generator: torch.Generator | None = None) -> Image.Image:
    """Cut out `size` (height and width) at a random place."""
    left = _integer(image.width - size[1], generator)
    top = _integer(image.height - size[0], generator)
    return image.crop((left, top, left + size[1], top + size[0]))


def center_crop(image: Image.Image, size: Size) -> Image.Image:
    """Cut out `size` (height and width) in the middle."""
    left, top = (image.width - size[1]) // 2, (image.height - size[0]) // 2
    return image.crop((left, top, left + size[1], top + size[0]))
