"""Generated pictures with classes and captions. They need no data set and no network connection."""

import colorsys
import io
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw

from lightning_tdisent.data.raw import Item
from lightning_tdisent.digests import digest

FINE = 4  # pictures are drawn larger by this factor and then reduced, for smooth edges
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")
Box = tuple[float, float, float, float]


def _triangle(draw: ImageDraw.ImageDraw, box: Box, colour: tuple[int, ...]) -> None:
    left, top, right, bottom = box
    draw.polygon([(left, bottom), (right, bottom), ((left + right) / 2, top)], fill=colour)


def _cross(draw: ImageDraw.ImageDraw, box: Box, colour: tuple[int, ...]) -> None:
    left, top, right, bottom = box
    third = (right - left) / 3
    draw.rectangle((left + third, top, right - third, bottom), fill=colour)
    draw.rectangle((left, top + third, right, bottom - third), fill=colour)


SHAPES: dict[str, Callable[[ImageDraw.ImageDraw, Box, tuple[int, ...]], None]] = {
    "circle": lambda draw, box, colour: draw.ellipse(box, fill=colour),
    "square": lambda draw, box, colour: draw.rectangle(box, fill=colour),
    "triangle": _triangle,
    "cross": _cross,
}


@dataclass(frozen=True)
class Toy:
    """A source for `prepare`: ``n`` pictures of size x size pixels, each of a coloured shape on grey.

    The class is the shape. Picture i is a function of (seed, i), so use a different seed for each split.
    """

    n: int
    size: int = 32
    seed: int = 0
    kind: str = "toy"
    classes: list[str] = field(default_factory=lambda: list(SHAPES))
    notes: list[str] = field(default_factory=list)
    shuffled: bool = False

    def __len__(self) -> int:
        return self.n

    def fingerprint(self) -> str:
        """Return a hash of everything that the pictures depend on."""
        return digest(f"toy/1 {self.n} {self.size} {self.seed}")

    def __getitem__(self, i: int) -> Item:
        rng = np.random.RandomState([self.seed, i])  # numpy guarantees that its stream never changes
        shape, colour = int(rng.randint(len(SHAPES))), int(rng.randint(len(COLOURS)))
        hue = colour / len(COLOURS) * 0.85 + rng.uniform(-0.02, 0.02)
        rgb = tuple(round(255 * v) for v in colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.6, 1), rng.uniform(0.6, 1)))
        fine = self.size * FINE
        side = fine * rng.uniform(0.3, 0.7)
        left, top = rng.uniform(0, fine - side, 2)
        image = Image.new("RGB", (fine, fine), (int(rng.randint(180, 256)),) * 3)
        name = list(SHAPES)[shape]
        SHAPES[name](ImageDraw.Draw(image), (left, top, left + side, top + side), rgb)
        png = io.BytesIO()
        image.resize((self.size, self.size), Image.Resampling.BOX).save(png, "png")
        members = {"png": png.getvalue(), "cls": str(shape).encode(), "txt": f"a {COLOURS[colour]} {name}".encode()}
        return Item(f"{name}-{i}", members)
