"""Structured tasks that are drawn, in the manner of CLEVR and dSprites: how many, where, which way, how far.

Every image has random colours, a background that gets lighter in some direction, and noise. What has to be told
apart is never a colour. The same task, number and seed give the same images.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
SIZE = 64
"""Height and width of a drawn image; [`images.decode`] brings it to the size of the backbone."""

Shape = Callable[[Array], Array]
"""Points (..., 2) in units of the radius, to their distance from the outline, negative inside."""


def polygon(corners: Array) -> Shape:
    """A convex polygon with corners (n, 2) in clockwise order on the screen, where y points down."""
    sides = np.roll(corners, -1, axis=0) - corners
    normals = np.stack([sides[:, 1], -sides[:, 0]], axis=1) / np.linalg.norm(sides, axis=1, keepdims=True)
    offsets = (normals * corners).sum(1)
    return lambda points: (points @ normals.T - offsets).max(-1)


def regular(sides: int) -> Shape:
    """A regular polygon in the unit circle."""
    angles = np.arange(sides) * 2 * math.pi / sides
    return polygon(np.stack([np.cos(angles), np.sin(angles)], axis=1))


def disc(points: Array) -> Array:
    """The unit disc."""
    return np.linalg.norm(points, axis=-1) - 1


SHAPES: tuple[Shape, ...] = (disc, regular(3), regular(4), regular(6))
POINTERS: tuple[Shape, ...] = (
    polygon(np.array([[1.0, 0.0], [-0.8, 0.5], [-0.8, -0.5]])),
    polygon(np.array([[1.0, 0.0], [-0.5, 0.45], [-0.8, 0.0], [-0.5, -0.45]])),
)
"""Shapes that point to the right, and to nowhere else."""


class Canvas:
    """One image (`SIZE`, `SIZE`, 3) in [0, 1], with the background painted. Coordinates are in [0, 1], y downwards."""

    def __init__(self, random: np.random.Generator) -> None:
        self.random = random
        axis = (np.arange(SIZE) + 0.5) / SIZE
        self.points = np.stack(np.meshgrid(axis, axis, indexing="xy"), axis=-1)
        self.dark = random.random() < 0.5
        base = random.uniform(0.0, 0.35, 3) if self.dark else random.uniform(0.65, 1.0, 3)
        slope = (self.points - 0.5) @ random.normal(0, 0.1, 2)
        self.pixels = np.clip(base + slope[..., None], 0, 1)

    def colour(self) -> Array:
        """A random colour, lighter than a dark background and darker than a light one in every channel."""
        return self.random.uniform(0.55, 1.0, 3) if self.dark else self.random.uniform(0.0, 0.45, 3)

    def draw(self, shape: Shape, centre: Array, radius: float, angle: float) -> None:
        """Paint a shape, turned by an angle (clockwise from the right), with edges that are one pixel soft."""
        cos, sin = math.cos(angle), math.sin(angle)
        local = (self.points - centre) @ np.array([[cos, -sin], [sin, cos]]) / radius
        cover = np.clip(0.5 - shape(local) * radius * SIZE, 0, 1)[..., None]
        self.pixels = self.pixels * (1 - cover) + self.colour() * cover

    def finish(self) -> NDArray[np.uint8]:
        """The image with noise, as bytes."""
        noise = self.random.normal(0, self.random.uniform(0, 0.05), self.pixels.shape)
        return (np.clip(self.pixels + noise, 0, 1) * 255).round().astype(np.uint8)

    def any_shape(self) -> Shape:
        return SHAPES[self.random.integers(len(SHAPES))]

    def any_angle(self) -> float:
        return float(self.random.uniform(0, 2 * math.pi))


def draw_count(canvas: Canvas, label: int) -> None:
    """`label + 1` objects, apart from each other."""
    placed: list[tuple[Array, float]] = []
    while len(placed) <= label:
        radius = canvas.random.uniform(0.05, 0.1)
        centre = canvas.random.uniform(radius, 1 - radius, 2)
        if all(np.linalg.norm(centre - other) > radius + size + 0.04 for other, size in placed):
            placed.append((centre, radius))
            canvas.draw(canvas.any_shape(), centre, radius, canvas.any_angle())


def draw_location(canvas: Canvas, label: int) -> None:
    """One object, whose centre is in the `label`-th of 16 columns."""
    across = 0.1 + 0.8 * (label + canvas.random.uniform(0.1, 0.9)) / 16
    centre = np.array([across, canvas.random.uniform(0.15, 0.85)])
    canvas.draw(canvas.any_shape(), centre, canvas.random.uniform(0.08, 0.15), canvas.any_angle())


def draw_orientation(canvas: Canvas, label: int) -> None:
    """One object, which points into the `label`-th of 16 directions."""
    angle = (label + canvas.random.uniform(-0.4, 0.4)) * 2 * math.pi / 16
    pointer = POINTERS[canvas.random.integers(len(POINTERS))]
    canvas.draw(pointer, canvas.random.uniform(0.3, 0.7, 2), canvas.random.uniform(0.18, 0.28), angle)


def draw_distance(canvas: Canvas, label: int) -> None:
    """Balls of one size on a plane. The nearest is in the `label`-th of 6 ranges of distance, the others behind it."""
    nearest = 1 + 0.5 * (label + canvas.random.uniform(0.1, 0.9))
    others = nearest + canvas.random.uniform(0.6, 3, canvas.random.integers(0, 4))
    for distance in [*sorted(others, reverse=True), nearest]:
        radius = 0.2 / distance
        centre = np.array([canvas.random.uniform(radius, 1 - radius), 0.3 + 0.45 / distance])
        canvas.draw(disc, centre, radius, 0.0)


DRAWN: dict[str, tuple[int, Callable[[Canvas, int], None]]] = {
    "drawn_count": (8, draw_count),
    "drawn_location": (16, draw_location),
    "drawn_orientation": (16, draw_orientation),
    "drawn_distance": (6, draw_distance),
}
"""The number of classes of each task, and what draws one of its images."""


def draw_task(name: str, number: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (number, `SIZE`, `SIZE`, 3) and labels of a drawn task, all classes equally often, in random order."""
    classes, draw = DRAWN[name]
    random = np.random.default_rng([seed, list(DRAWN).index(name)])
    labels = random.permutation(np.arange(number) % classes)
    images = []
    for label in labels:
        canvas = Canvas(random)
        draw(canvas, int(label))
        images.append(canvas.finish())
    return np.stack(images), labels
