"""Scenes and their drawing: rows of coloured shapes on a plain or patterned background."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, TypeAlias

from PIL import Image, ImageDraw

Rgb: TypeAlias = tuple[int, int, int]
Point: TypeAlias = tuple[float, float]

COLOURS: dict[str, Rgb] = {
    "red": (214, 40, 40),
    "orange": (247, 127, 0),
    "yellow": (250, 210, 30),
    "green": (40, 150, 70),
    "blue": (30, 95, 215),
    "purple": (125, 55, 190),
    "pink": (255, 120, 185),
    "black": (28, 28, 32),
}

BACKGROUNDS: dict[str, Rgb] = {
    "white": (250, 250, 247),
    "grey": (172, 176, 182),
    "beige": (231, 212, 176),
    "turquoise": (132, 214, 206),
}

PATTERNS = ("plain", "striped", "dotted")

SIZES = {"small": 0.18, "large": 0.29}
"""Side of a shape as a share of the image's shorter side."""

POSITIONS = (("left", "middle", "right"), ("top", "middle", "bottom"))
"""The thirds of an image, horizontal and vertical; a scene uses one of the two."""

FRAMES = ((400, 300), (360, 270), (320, 240), (300, 400), (320, 320))
"""Width and height of images in pixels."""


@dataclass(frozen=True)
class Group:
    """Equal shapes side by side in one third of the image."""

    count: int
    size: str
    colour: str
    shape: str
    position: str


class Background(NamedTuple):
    """Pattern and colour behind the shapes."""

    pattern: str
    colour: str


class Shape(NamedTuple):
    """One drawn shape: its group and its pixels as `x0, y0, x1, y1`."""

    group: Group
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Scene:
    """The content of one image.

    Args:
        frame: width and height in pixels.
        ground: pattern and colour behind the shapes.
        shapes: from left to right or from top to bottom.
    """

    frame: tuple[int, int]
    background: Background
    shapes: tuple[Shape, ...]

    @property
    def groups(self) -> tuple[Group, ...]:
        """One to three groups of different colours and places."""
        return tuple(dict.fromkeys(shape.group for shape in self.shapes))


def make_scene(name: str) -> Scene:
    """The scene of the seed `name`; two names seldom give one scene."""
    rng = random.Random(name)
    frame = rng.choice(FRAMES)
    across = rng.random() < 0.5
    number = rng.choices((1, 2, 3), weights=(3, 5, 2))[0]
    thirds = sorted(rng.sample(range(3), number))
    colours = rng.sample(sorted(COLOURS), number)
    background = Background(rng.choice(PATTERNS), rng.choice(sorted(BACKGROUNDS)))
    shapes: list[Shape] = []
    for third, colour in zip(thirds, colours, strict=True):
        group = Group(
            count=rng.randint(1, 3),
            size=rng.choice(sorted(SIZES)),
            colour=colour,
            shape=rng.choice(sorted(SHAPES)),
            position=POSITIONS[0 if across else 1][third],
        )
        shapes += _row_of_shapes(group, third, frame, rng, across=across)
    return Scene(frame, background, tuple(shapes))


def draw_scene(scene: Scene) -> Image.Image:
    """The scene in RGB; deterministic."""
    image = _draw_background(scene.background, scene.frame).copy()
    for group, box in scene.shapes:
        side = box[2] - box[0]
        colour = COLOURS[group.colour]
        image.paste(_shaded(colour, 0.72), box[:2], _shape_mask(group.shape, side))
        rim = max(side // 16, 1)
        inner = (box[0] + rim, box[1] + rim)
        image.paste(colour, inner, _shape_mask(group.shape, side - 2 * rim))
    return image


def _row_of_shapes(
    group: Group, third: int, frame: tuple[int, int], rng: random.Random, *, across: bool
) -> list[Shape]:
    """Boxes of a group's shapes: a row in its third, slightly displaced."""
    side = round(SIZES[group.size] * min(frame))
    width, height = frame
    thick, length = (width / 3, height) if across else (height / 3, width)
    gap = min((length - group.count * side) / (group.count + 1), side * 0.6)
    spare = (length - group.count * side - (group.count - 1) * gap) / 2
    start = spare + rng.uniform(-0.5, 0.5) * spare
    shapes = []
    for number in range(group.count):
        along = start + number * (side + gap)
        beside = (third + 0.5) * thick - side / 2 + rng.uniform(-0.4, 0.4) * (thick - side)
        x, y = (beside, along) if across else (along, beside)
        left, top = round(x), round(y)
        shapes.append(Shape(group, (left, top, left + side, top + side)))
    return shapes


@lru_cache(maxsize=256)
def _draw_background(background: Background, frame: tuple[int, int]) -> Image.Image:
    colour = BACKGROUNDS[background.colour]
    image = Image.new("RGB", frame, colour)
    pen = ImageDraw.Draw(image)
    darker = _shaded(colour, 0.86)
    width, height = frame
    step = min(frame) // 8
    if background.pattern == "striped":
        for y in range(0, height, 2 * step):
            pen.rectangle((0, y, width, y + step - 1), fill=darker)
    elif background.pattern == "dotted":
        for x in range(step // 2, width, step):
            for y in range(step // 2, height, step):
                pen.circle((x, y), step // 4, fill=darker)
    return image


@lru_cache(maxsize=256)
def _shape_mask(shape: str, side: int) -> Image.Image:
    """The shape in white on black, drawn at four times the size for a smooth edge."""
    large = Image.new("L", (4 * side, 4 * side))
    pen = ImageDraw.Draw(large)
    if shape == "circle":
        pen.ellipse((0, 0, 4 * side - 1, 4 * side - 1), fill=255)
    else:
        pen.polygon([(4 * side * x, 4 * side * y) for x, y in SHAPES[shape]()], fill=255)
    return large.reduce(4)


def _shaded(colour: Rgb, light: float) -> Rgb:
    red, green, blue = (round(channel * light) for channel in colour)
    return red, green, blue


def _ring_points(count: int, *, inner: float = 1.0) -> list[Point]:
    """Points on a circle, the first at the top; every second one at the radius `inner`."""
    points = []
    for number in range(count):
        angle = 2 * math.pi * number / count
        radius = 0.5 * (inner if number % 2 else 1.0)
        points.append((0.5 + radius * math.sin(angle), 0.5 - radius * math.cos(angle)))
    return points


def _heart_points() -> list[Point]:
    points = []
    for number in range(40):
        angle = 2 * math.pi * number / 40
        wave = 13 * math.cos(angle) - 5 * math.cos(2 * angle)
        wave -= 2 * math.cos(3 * angle) + math.cos(4 * angle)
        points.append((0.5 + 0.5 * math.sin(angle) ** 3, 0.41 - wave / 29))
    return points


SHAPES: dict[str, Callable[[], list[Point]]] = {
    "circle": lambda: _ring_points(64),
    "square": lambda: [(0, 0), (1, 0), (1, 1), (0, 1)],
    "triangle": lambda: [(0.5, 0), (1, 1), (0, 1)],
    "star": lambda: _ring_points(10, inner=0.42),
    "heart": _heart_points,
    "cross": lambda: [
        *((0.33, 0), (0.67, 0), (0.67, 0.33), (1, 0.33), (1, 0.67), (0.67, 0.67)),
        *((0.67, 1), (0.33, 1), (0.33, 0.67), (0, 0.67), (0, 0.33), (0.33, 0.33)),
    ],
}
"""Corners of each shape in a box of side 1."""
