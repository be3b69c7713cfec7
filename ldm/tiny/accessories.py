"""Accessories: hats, glasses, scarves and ties that a thing with a head wears.

`ACCESSORIES` maps the words of a caption ("wearing a red hat") to a function of a generator that
draws it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from ldm.tiny.scenes.paint import shade
from ldm.tiny.scenes.props import Sketch

VARIANTS = 4  # drawings of each accessory


@dataclass(frozen=True)
class Accessory:
    """A drawing, where it is worn, and how wide it is, in widths of the head.

    `lift` is the share of its height that lies above the anchor.
    """

    image: Image.Image
    anchor: str
    width: float
    lift: float


Draw = Callable[[np.random.Generator], Accessory]
ACCESSORIES: dict[str, Draw] = {}


def accessory(words: str) -> Callable[[Draw], Draw]:
    """Register a drawing under the words of a caption."""

    def register(draw: Draw) -> Draw:
        ACCESSORIES[words] = draw
        return draw

    return register


@functools.cache
def variant(words: str, number: int) -> Accessory:
    """Return one of the drawings of an accessory. A number means the same one in every process."""
    return ACCESSORIES[words](np.random.default_rng([number, *words.encode()]))


def worn(rng: np.random.Generator, words: str) -> Accessory:
    """Choose one of the drawings of an accessory."""
    return variant(words, int(rng.integers(VARIANTS)))


def wearable(anchors: Mapping[str, Sequence[float]], camera: str | None) -> list[str]:
    """Return the accessories that a sprite can wear.

    Glasses and ties need a face that is seen. A thing without a head wears nothing, and neither
    does a thing seen from above.
    """
    if camera == "above":
        return []
    hidden = ("eyes", "neck") if camera in ("away", "back", "side", "turned") else ()
    seen = set(anchors) - set(hidden)
    return [words for words in ACCESSORIES if variant(words, 0).anchor in seen]


def finished(sketch: Sketch) -> Image.Image:
    """Trim a drawing and shade it from the left to the right."""
    image = sketch.image.crop(sketch.image.getchannel("A").getbbox())
    pixels = np.array(image, np.float32)
    light = np.linspace(1.12, 0.8, image.width)[None, :, None]
    pixels[..., :3] = np.clip(pixels[..., :3] * light, 0, 255)
    soft = Image.fromarray(pixels.astype(np.uint8))
    return soft.filter(ImageFilter.SMOOTH)


def arc(
    x: float, y: float, rx: float, ry: float, start: float, end: float
) -> list[tuple[float, float]]:
    """Return points along an ellipse. Angles are in turns: 1 is the whole way round."""
    angles = np.linspace(2 * math.pi * start, 2 * math.pi * end, 24)
    return [(x + rx * math.cos(t), y + ry * math.sin(t)) for t in angles.tolist()]


# ---- hats ----------------------------------------------------------------------------------------


@accessory("wearing a red hat")
def red_hat(rng: np.random.Generator) -> Accessory:
    """Draw a red hat with a brim and a dark band."""
    sketch = Sketch(1.4, 0.9)
    red = ("#d8232f", "#c81e2c", "#e23a34", "#d0262a")[rng.integers(4)]
    sketch.disc(0.7, 0.68, 0.66, 0.16, shade(red, 0.72))
    sketch.disc(0.7, 0.64, 0.66, 0.15, red)
    sketch.polygon([(0.32, 0.64), *arc(0.7, 0.34, 0.34, 0.3, 0.5, 1.0), (1.08, 0.64)], red)
    sketch.disc(0.7, 0.64, 0.38, 0.09, red)
    sketch.polygon([(0.315, 0.52), (1.085, 0.52), (1.085, 0.64), (0.315, 0.64)], "#5e0a10")
    return Accessory(finished(sketch), "crown", 1.45, 0.62)


@accessory("wearing a santa hat")
def santa_hat(rng: np.random.Generator) -> Accessory:
    """Draw a red cap that falls to one side, with white fur and a pompon."""
    sketch, red = Sketch(1.3, 1.1), "#d3202c"
    cone = [
        (0.2, 0.82),
        (0.38, 0.32),
        (0.62, 0.1),
        (0.95, 0.16),
        (1.14, 0.5),
        (0.98, 0.46),
        (0.92, 0.5),
        (1.0, 0.82),
    ]
    sketch.polygon(cone, red)
    sketch.line([(0.92, 0.5), (0.72, 0.4)], shade(red, 0.7), 0.04)
    for x in np.linspace(0.2, 1.0, 9):
        sketch.disc(float(x), 0.88, 0.12, 0.11, "#ffffff")
    sketch.disc(1.12, 0.58, 0.14, 0.14, "#ffffff")
    return Accessory(finished(sketch), "crown", 1.3, 0.74)


@accessory("wearing a black top hat")
def top_hat(rng: np.random.Generator) -> Accessory:
    """Draw a tall black hat with a coloured band."""
    sketch = Sketch(1.2, 1.1)
    band = ("#b3202c", "#6a2fa0", "#d0a52e", "#e8e8ea")[rng.integers(4)]
    sketch.disc(0.6, 0.94, 0.56, 0.13, "#0b0b0e")
    sketch.polygon([(0.27, 0.14), (0.93, 0.14), (0.88, 0.92), (0.32, 0.92)], "#1b1b21")
    sketch.disc(0.6, 0.15, 0.33, 0.08, "#34343d")
    sketch.polygon([(0.305, 0.74), (0.895, 0.74), (0.885, 0.9), (0.315, 0.9)], band)
    sketch.disc(0.6, 0.92, 0.28, 0.06, "#1b1b21")
    return Accessory(finished(sketch), "crown", 1.25, 0.82)


@accessory("wearing a golden crown")
def crown(rng: np.random.Generator) -> Accessory:
    """Draw a crown of five points with stones."""
    sketch, gold = Sketch(1.2, 0.8), "#f2b91f"
    tips = [
        (0.1, 0.2),
        (0.3, 0.48),
        (0.36, 0.1),
        (0.5, 0.46),
        (0.6, 0.04),
        (0.7, 0.46),
        (0.84, 0.1),
        (0.9, 0.48),
    ]
    sketch.polygon([(0.16, 0.78), *tips, (1.1, 0.2), (1.04, 0.78)], gold)
    sketch.disc(0.6, 0.76, 0.44, 0.06, shade(gold, 0.8))
    for x, y in ((0.1, 0.2), (0.36, 0.1), (0.6, 0.05), (0.84, 0.1), (1.1, 0.2)):
        sketch.disc(x, y, 0.055, 0.055, "#fff2b0")
    for x, stone in ((0.36, "#2f6fe0"), (0.6, "#d8232f"), (0.84, "#2f6fe0")):
        sketch.disc(x, 0.62, 0.065, 0.065, stone)
    return Accessory(finished(sketch), "crown", 1.0, 0.8)


@accessory("wearing a purple wizard hat")
def wizard_hat(rng: np.random.Generator) -> Accessory:
    """Draw a tall pointed purple hat with stars."""
    sketch = Sketch(1.4, 1.4)
    purple = ("#6a2fb0", "#7a38c4", "#5c2a9c", "#7030a8")[rng.integers(4)]
    sketch.disc(0.7, 1.22, 0.66, 0.14, shade(purple, 0.7))
    sketch.disc(0.7, 1.19, 0.66, 0.13, purple)
    sketch.polygon([(0.3, 1.2), (0.55, 0.5), (0.84, 0.06), (0.86, 0.55), (1.1, 1.2)], purple)
    sketch.disc(0.7, 1.19, 0.4, 0.08, shade(purple, 0.8))
    for x, y, r in ((0.6, 0.95, 0.075), (0.86, 0.86, 0.06), (0.72, 0.62, 0.055)):
        for angle in (0.0, math.pi / 2):
            sketch.leaf(x, y, r, 0.35 * r, angle, "#ffd84a")
            sketch.leaf(x, y, 0.7 * r, 0.3 * r, angle + math.pi / 4, "#ffd84a")
    return Accessory(finished(sketch), "crown", 1.4, 0.8)


# ---- eyes ----------------------------------------------------------------------------------------


def _glasses(rim: str, lens: str, square: bool) -> Accessory:
    """Draw two rims with lenses and a bridge."""
    sketch = Sketch(1.6, 0.6)
    for x in (0.42, 1.18):
        if square:
            sketch.box(x - 0.36, 0.06, x + 0.36, 0.54, rim)
            sketch.box(x - 0.28, 0.13, x + 0.28, 0.47, lens)
        else:
            sketch.disc(x, 0.3, 0.36, 0.28, rim)
            sketch.disc(x, 0.3, 0.28, 0.21, lens)
        sketch.line([(x - 0.14, 0.2), (x - 0.02, 0.14)], "#ffffff", 0.035)
    sketch.line([(0.74, 0.24), (0.86, 0.24)], rim, 0.09)
    return Accessory(finished(sketch), "eyes", 0.98, 0.5)


@accessory("wearing sunglasses")
def sunglasses(rng: np.random.Generator) -> Accessory:
    """Draw black glasses with dark lenses."""
    return _glasses("#0c0c10", "#181a22", square=bool(rng.integers(2)))


@accessory("wearing pink glasses")
def pink_glasses(rng: np.random.Generator) -> Accessory:
    """Draw glasses with thick pink rims; the eyes show through."""
    return _glasses("#f0418f", "#ffcde45a", square=bool(rng.integers(2)))


# ---- neck ----------------------------------------------------------------------------------------


@accessory("wearing a bow tie")
def bow_tie(rng: np.random.Generator) -> Accessory:
    """Draw a bow tie in a bright colour."""
    sketch = Sketch(1.0, 0.6)
    colour = ("#d8232f", "#2050d0", "#161619", "#d8232f")[rng.integers(4)]
    for side in (-1, 1):
        wing = [
            (0.5, 0.3),
            (0.5 + 0.46 * side, 0.04),
            (0.5 + 0.4 * side, 0.3),
            (0.5 + 0.46 * side, 0.56),
        ]
        sketch.polygon(wing, colour)
        sketch.line([(0.5 + 0.12 * side, 0.3), (0.5 + 0.34 * side, 0.22)], shade(colour, 0.6), 0.03)
    sketch.disc(0.5, 0.3, 0.11, 0.13, shade(colour, 0.75))
    return Accessory(finished(sketch), "neck", 0.8, 0.45)


@accessory("wearing a rainbow scarf")
def rainbow_scarf(rng: np.random.Generator) -> Accessory:
    """Draw a scarf with stripes of the rainbow, one end hanging down."""
    sketch = Sketch(1.3, 1.0)
    colours = ("#e0322f", "#f58a1f", "#f7d52b", "#3aa848", "#2f6fdd", "#8038c0")
    left = bool(rng.integers(2))
    end = 0.36 if left else 0.94
    for k, colour in enumerate(colours):
        x = 0.12 + 1.06 * k / 6
        corners = [(x, 0.12), (x + 1.06 / 6, 0.12), (x + 1.06 / 6, 0.42), (x, 0.42)]
        # The scarf hangs lowest in its middle.
        sagging = [(px, py + 0.13 * math.sin(math.pi * (px - 0.12) / 1.06)) for px, py in corners]
        sketch.polygon(sagging, colour)
        sketch.box(end - 0.13, 0.42 + 0.085 * k, end + 0.13, 0.42 + 0.085 * (k + 1), colour)
    for x in np.linspace(end - 0.11, end + 0.11, 5):
        sketch.line([(float(x), 0.92), (float(x), 0.99)], colours[0], 0.02)
    return Accessory(finished(sketch), "neck", 1.15, 0.3)
