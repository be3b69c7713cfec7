"""Props: trees, clouds, houses and other things of a scene, as RGBA images of a given height.

`prop` caches them. A variant of a prop is the same in every process.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from ldm.tiny.scenes.paint import (
    AUTUMN,
    MASTER,
    Paint,
    Points,
    leaf_outline,
    noise,
    pick,
    scaled,
    shade,
    to_hex,
)

PROPS: dict[str, Callable[[np.random.Generator], Image.Image]] = {}


def prop_of(kind: str) -> Callable:
    """Register a drawing as the prop of this name."""

    def register(draw: Callable[[np.random.Generator], Image.Image]) -> Callable:
        PROPS[kind] = draw
        return draw

    return register


@functools.cache
def _master(kind: str, variant: int) -> Image.Image:
    """Draw a prop large, trimmed to what it shows."""
    image = PROPS[kind](np.random.default_rng([variant, *kind.encode()]))
    return image.crop(image.getchannel("A").getbbox())


@functools.lru_cache(maxsize=2048)
def prop(kind: str, variant: int, height: int, mirrored: bool) -> Image.Image:
    """Return variant number `variant` of a prop, `height` pixels high."""
    master = _master(kind, variant)
    if mirrored:
        master = master.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    width = max(1, round(master.width * height / master.height))
    return master.resize((width, max(1, height)), Image.Resampling.BICUBIC, reducing_gap=2.0)


class Sketch:
    """A transparent drawing. Lengths are in units of MASTER pixels, y downwards."""

    def __init__(self, width: float = 1.0, height: float = 1.0):
        self.image = Image.new("RGBA", (round(width * MASTER), round(height * MASTER)))
        self._draw = ImageDraw.Draw(self.image)

    def polygon(self, points: Points, colour: Paint) -> None:
        """Fill a polygon."""
        self._draw.polygon(scaled(points), fill=to_hex(colour))

    def line(self, points: Points, colour: Paint, width: float) -> None:
        """Draw a line through points."""
        self._draw.line(scaled(points), fill=to_hex(colour), width=max(1, round(width * MASTER)))

    def box(self, left: float, top: float, right: float, bottom: float, colour: Paint) -> None:
        """Fill an upright rectangle."""
        self._draw.rectangle([MASTER * v for v in (left, top, right, bottom)], fill=to_hex(colour))

    def disc(self, x: float, y: float, rx: float, ry: float, colour: Paint) -> None:
        """Fill an ellipse around (x, y)."""
        self._draw.ellipse(
            [MASTER * v for v in (x - rx, y - ry, x + rx, y + ry)], fill=to_hex(colour)
        )

    def leaf(
        self, x: float, y: float, length: float, width: float, angle: float, colour: Paint
    ) -> None:
        """Fill a pointed ellipse around (x, y)."""
        self.polygon(leaf_outline(x, y, length, width, angle), colour)

    def erase(self, points: Points) -> None:
        """Make a polygon transparent."""
        self._draw.polygon(scaled(points), fill=(0, 0, 0, 0))


@prop_of("cloud")
def _cloud(rng: np.random.Generator) -> Image.Image:
    sketch = Sketch(2.4, 1.0)
    puffs = [
        (x, 0.62 - 0.3 * math.sin(1.75 * (x - 0.3)) * rng.uniform(0.5, 1))
        for x in np.linspace(0.4, 2.0, 7)
    ]
    for dy, colour in ((0.08, "#cfdcec"), (0.0, "#ffffff")):
        for x, y in puffs:
            r = rng.uniform(0.17, 0.26)
            sketch.disc(x, y + dy, 1.2 * r, 0.85 * r, colour)
    return sketch.image.filter(ImageFilter.GaussianBlur(MASTER / 60))


@prop_of("fir")
def _fir(rng: np.random.Generator) -> Image.Image:
    sketch, middle = Sketch(0.8, 1.0), 0.4
    green, snowy = pick(rng, "#2f6b54", "#3b7a5c", "#28604f"), rng.random() < 0.75
    sketch.box(0.36, 0.85, 0.44, 1.0, "#5b4632")
    for k in range(4):
        top, foot, half = 0.02 + 0.19 * k, 0.36 + 0.18 * k, 0.15 + 0.075 * k
        sketch.polygon(
            [(middle, top), (middle - half, foot), (middle + half, foot)],
            shade(green, 1 - 0.05 * k),
        )
        sketch.polygon(
            [(middle, top), (middle, foot), (middle + half, foot)], shade(green, 0.8 - 0.04 * k)
        )
        if snowy:
            drop, reach = top + 0.5 * (foot - top), 0.5 * half
            jag = [
                (middle + reach, drop),
                (middle + 0.3 * reach, 0.25 * top + 0.75 * drop),
                (middle, drop),
            ]
            sketch.polygon([(middle, top), *jag, (middle - reach, drop)], "#f4f8ff")
    return sketch.image


def broad_leaved(rng: np.random.Generator, colours: Sequence[str]) -> Image.Image:
    """Draw a tree with a round crown of leaves in these colours."""
    sketch = Sketch(1.1, 1.25)
    trunk = pick(rng, "#6b4528", "#5a3a22")
    sketch.polygon([(0.49, 0.6), (0.46, 1.25), (0.64, 1.25), (0.61, 0.6)], trunk)
    sketch.line([(0.55, 0.85), (0.32, 0.5)], trunk, 0.05)
    sketch.line([(0.55, 0.8), (0.8, 0.5)], shade(trunk, 0.9), 0.05)
    for k in range(90):
        angle = rng.uniform(0, 2 * math.pi)
        reach = math.sqrt(rng.uniform(0, 1))
        r = rng.uniform(0.05, 0.11)
        x, y = 0.55 + 0.42 * reach * math.cos(angle), 0.44 + 0.34 * reach * math.sin(angle)
        sketch.disc(
            x, y, r, 0.9 * r, shade(pick(rng, *colours), 0.72 + 0.28 * k / 90 + 0.18 * (0.44 - y))
        )
    return sketch.image


@prop_of("autumn tree")
def _autumn_tree(rng: np.random.Generator) -> Image.Image:
    first = rng.integers(3)
    return broad_leaved(rng, AUTUMN[first : first + 4])


@prop_of("tree")
def _tree(rng: np.random.Generator) -> Image.Image:
    return broad_leaved(rng, ("#2f8f3a", "#3fa545", "#277a3e", "#58b14a"))


@prop_of("palm")
def _palm(rng: np.random.Generator) -> Image.Image:
    sketch, lean = Sketch(1.2, 1.3), rng.uniform(0.05, 0.25)
    trunk = [(0.6 - lean * (1 - t) ** 2, 0.35 + 0.95 * (1 - t)) for t in np.linspace(0, 1, 9)]
    for k, ends in enumerate(pairwise(trunk)):
        sketch.line(ends, ("#8a6239", "#9d7245")[k % 2], 0.07)
    t = np.linspace(0, 1, 10)
    width = 0.055 * np.sin(math.pi * np.clip(t, 0.06, 1))
    for angle in np.linspace(-0.35, math.pi + 0.35, 8):
        for lift, tone in ((0.0, 0.85), (0.025, 1.05)):
            x, y = 0.6 + 0.5 * np.cos(angle) * t, 0.35 - 0.3 * np.sin(angle) * t + 0.3 * t**2 - lift
            sketch.polygon(
                [*zip(x, y - width), *zip(x[::-1], (y + width)[::-1])], shade("#3f9a3c", tone)
            )
    return sketch.image


@prop_of("leaf")
def _leaf(rng: np.random.Generator) -> Image.Image:
    """Draw a large leaf of the jungle, in any direction."""
    sketch, green = Sketch(), pick(rng, "#2c9b3f", "#1f7f36", "#49b248", "#15703a")
    angle, length, width = rng.uniform(-0.9, 0.9) - math.pi / 2, 0.47, rng.uniform(0.13, 0.24)
    c, s = math.cos(angle), math.sin(angle)
    sketch.leaf(0.5, 0.5, length, width, angle, shade(green, 0.62))
    sketch.leaf(0.49, 0.48, 0.94 * length, 0.86 * width, angle, green)
    for t in np.linspace(-0.75, 0.6, 7):
        x, y = 0.5 + c * t * length, 0.5 + s * t * length
        reach = 0.75 * width * math.sqrt(1 - t * t)
        for side in (-reach, reach):
            sketch.line(
                [(x, y), (x + 0.5 * reach * c - side * s, y + 0.5 * reach * s + side * c)],
                shade(green, 0.72),
                0.01,
            )
    tip, stem = 0.9 * length, -length
    sketch.line(
        [(0.5 + c * stem, 0.5 + s * stem), (0.5 + c * tip, 0.5 + s * tip)],
        shade(green, 1.45),
        0.026,
    )
    return sketch.image


@prop_of("frond")
def _frond(rng: np.random.Generator) -> Image.Image:
    """Draw a fern, in any direction."""
    sketch, green = Sketch(), pick(rng, "#3fae45", "#27933f", "#63bd4c")
    angle = rng.uniform(-1.0, 1.0) - math.pi / 2
    for t in np.linspace(-0.9, 0.9, 13):
        x, y = 0.5 + 0.45 * t * math.cos(angle), 0.5 + 0.45 * t * math.sin(angle)
        reach = 0.3 * math.cos(1.2 * t)
        for side in (-1, 1):
            turn = angle + 0.95 * side
            x_leaf, y_leaf = x + 0.5 * reach * math.cos(turn), y + 0.5 * reach * math.sin(turn)
            sketch.leaf(
                x_leaf, y_leaf, 0.55 * reach, 0.15 * reach, turn, shade(green, 0.9 + 0.15 * side)
            )
    return sketch.image


@prop_of("sunflower")
def _sunflower(rng: np.random.Generator) -> Image.Image:
    sketch, turn = Sketch(0.9, 1.5), rng.uniform(0, 1)
    sketch.line([(0.45, 0.45), (0.45 + rng.uniform(-0.06, 0.06), 1.5)], "#3f8a2d", 0.07)
    for side in (-1, 1):
        sketch.leaf(0.45 + 0.17 * side, 1.05 + 0.1 * side, 0.2, 0.09, -0.5 * side, "#4fa336")
    for ring, (reach, colour) in enumerate(((0.3, "#f0a818"), (0.26, "#ffd22e"))):
        for k in range(14):
            angle = 2 * math.pi * (k + 0.5 * ring + turn) / 14
            sketch.leaf(
                0.45 + reach * math.cos(angle),
                0.44 + reach * math.sin(angle),
                0.15,
                0.07,
                angle,
                colour,
            )
    sketch.disc(0.45, 0.44, 0.20, 0.20, "#5a3414")
    sketch.disc(0.44, 0.43, 0.12, 0.12, "#7a4a1d")
    return sketch.image


@prop_of("wheat")
def _wheat_clump(rng: np.random.Generator) -> Image.Image:
    sketch = Sketch(1.2, 1.0)
    for _ in range(34):
        foot, top = rng.uniform(0.05, 1.15), rng.uniform(0.08, 0.5)
        colour = pick(rng, "#e3b548", "#d39d35", "#f3d06a")
        tip = foot + rng.uniform(-0.12, 0.12)
        sketch.line([(foot, 1.0), (tip, top)], shade(colour, 0.85), 0.016)
        sketch.leaf(tip, top, 0.11, 0.034, math.atan2(top - 1, tip - foot), shade(colour, 1.1))
    return sketch.image


@prop_of("fallen leaf")
def _fallen_leaf(rng: np.random.Generator) -> Image.Image:
    sketch, colour, angle = Sketch(0.5, 0.5), pick(rng, *AUTUMN), rng.uniform(0, math.pi)
    for spread in (-0.9, 0.0, 0.9):
        sketch.leaf(0.25, 0.25, 0.2, 0.07, angle + spread, colour)
    return sketch.image


@prop_of("mountain")
def _mountain(rng: np.random.Generator) -> Image.Image:
    sketch, rock = Sketch(2.2, 1.0), pick(rng, "#6d7a96", "#7b7f93", "#5f7190", "#81756f")
    peaks = sorted(
        ((rng.uniform(0.05, 0.4), rng.uniform(0.45, 1.75)) for _ in range(3)), reverse=True
    )
    zigzag = ((1, 0), (0.5, -0.3), (0.2, 0.15), (-0.15, -0.25), (-0.5, 0.1), (-1, 0))
    for top, x in peaks:
        reach, share = (1 - top) * rng.uniform(0.75, 0.95), rng.uniform(0.3, 0.4)
        sketch.polygon([(x, top), (x - reach, 1.0), (x + reach, 1.0)], shade(rock, 1.12))
        sketch.polygon(
            [(x, top), (x - 0.08, 0.55), (x + 0.05, 1.0), (x + reach, 1.0)], shade(rock, 0.75)
        )
        snow = share * (1 - top)
        line = [(x + share * reach * u, top + snow * (1 + v)) for u, v in zigzag]
        sketch.polygon([(x, top), *line], "#ffffff")
        sketch.polygon([(x, top), *line[:3], (x, top + 0.6 * snow)], "#cbd8ea")
    return sketch.image


@prop_of("tower block")
def _tower_block(rng: np.random.Generator) -> Image.Image:
    width = rng.uniform(0.24, 0.46)
    sketch = Sketch(width, 1.0)
    wall = pick(rng, "#6f7f9a", "#8a8fa3", "#5c6b86", "#a08f86", "#7d96a8", "#9b7f77")
    sketch.box(0, 0.05, width, 1.0, wall)
    sketch.box(0.72 * width, 0.05, width, 1.0, shade(wall, 0.8))
    if rng.random() < 0.5:
        sketch.box(0.4 * width, 0, 0.6 * width, 0.06, shade(wall, 0.9))
    # About every second window has another colour than the rest: it is lit, or dark.
    other = "#ffe9a3" if rng.random() < 0.5 else "#2d3b54"
    for y in np.arange(0.12, 0.93, 0.13):
        for x in np.arange(0.04, width - 0.08, 0.125):
            sketch.box(x, y, x + 0.075, y + 0.075, other if rng.random() < 0.5 else "#dff1ff")
    return sketch.image


@prop_of("blue house")
def _blue_house(rng: np.random.Generator) -> Image.Image:
    sketch, wall = Sketch(1.35, 1.0), pick(rng, "#2f6fd0", "#3b82dd", "#2a5fb8", "#4a8fe0")
    roof = pick(rng, "#8a3d2a", "#a24a33", "#5f4339", "#7b2f2f")
    door = pick(rng, "#8a4b2d", "#c0392b", "#f0e6d2")
    sketch.box(0.12, 0.4, 1.23, 1.0, wall)
    for y in np.arange(0.44, 1.0, 0.055):
        sketch.line([(0.12, y), (1.23, y)], shade(wall, 0.88), 0.01)
    sketch.box(0.95, 0.02, 1.07, 0.3, "#7a4a3c")
    sketch.polygon([(0.0, 0.44), (0.28, 0.06), (1.07, 0.06), (1.35, 0.44)], roof)
    sketch.polygon([(0.0, 0.44), (0.03, 0.40), (1.32, 0.40), (1.35, 0.44)], shade(roof, 0.7))
    for x in (0.22, 0.9):
        sketch.box(x - 0.02, 0.53, x + 0.24, 0.77, "#ffffff")
        sketch.box(x, 0.55, x + 0.22, 0.75, "#ffe7a0")
        sketch.line([(x + 0.11, 0.55), (x + 0.11, 0.75)], "#ffffff", 0.02)
    sketch.box(0.56, 0.6, 0.78, 1.0, "#ffffff")
    sketch.box(0.58, 0.62, 0.76, 1.0, door)
    return sketch.image


@prop_of("facade")
def _facade(rng: np.random.Generator) -> Image.Image:
    """Draw a house of an old street."""
    width = rng.uniform(0.5, 0.75)
    sketch, shutter = Sketch(width, 1.0), pick(rng, "#4f7a5a", "#7a4a38", "#4d6a8a")
    wall = pick(rng, "#d9a77b", "#c98b6b", "#e3c79a", "#b97a5e", "#cfc0a5", "#d98e73")
    sketch.box(0, 0, width, 1.0, wall)
    sketch.box(width - 0.02, 0, width, 1.0, shade(wall, 0.65))
    for y in (0.12, 0.56):
        for x in (0.22 * width, 0.66 * width):
            sketch.box(x - 0.06, y, x + 0.18, y + 0.26, shutter)
            sketch.box(x, y, x + 0.12, y + 0.26, "#38424f")
    return sketch.image


@prop_of("eiffel tower")
def _eiffel_tower(rng: np.random.Generator) -> Image.Image:
    """Draw four legs that meet in a spire, two platforms and an arch between the feet."""
    sketch, iron = Sketch(0.9, 1.6), pick(rng, "#6b4f3a", "#5b4636", "#77583f", "#4d4038")
    middle, y = 0.45, np.linspace(0.08, 1.6, 80)
    half = 0.016 + 0.4 * ((y - 0.08) / 1.52) ** 2.1
    right = [*zip((middle + half)[::-1], y[::-1])]
    sketch.polygon([*zip(middle - half, y), *right], iron)
    sketch.polygon([*zip(middle + 0.3 * half, y), *right], shade(iron, 0.78))

    # Make transparent what one sees through: the arch, and a wedge between each pair of platforms.
    arch = [
        (middle + 0.24 * math.cos(t), 1.64 - 0.34 * math.sin(t))
        for t in np.linspace(0, math.pi, 24)
    ]
    sketch.erase(arch)
    sketch.erase([(middle, 0.86), (middle - 0.055, 1.1), (middle + 0.055, 1.1)])
    sketch.line([(middle, 0.4), (middle, 0.8)], shade(iron, 0.6), 0.02)
    for level, reach, thick in ((0.80, 0.14, 0.05), (1.14, 0.26, 0.06), (0.28, 0.05, 0.03)):
        sketch.box(middle - reach, level, middle + reach, level + thick, shade(iron, 0.55))
    sketch.line([(middle, 0.0), (middle, 0.14)], shade(iron, 0.7), 0.03)
    return sketch.image


def _rug(
    rng: np.random.Generator, rings: Sequence[tuple[float, Paint]], pile: float
) -> Image.Image:
    """Draw an oval rug as seen at an angle, its pile rough at the edge."""
    sketch = Sketch(2.6, 1.0)
    for angle in np.linspace(0, 2 * math.pi, 150):
        rx, ry = pile * rng.uniform((0.5, 0.3), (1.0, 0.8))
        sketch.disc(1.3 + 1.2 * math.cos(angle), 0.5 + 0.44 * math.sin(angle), rx, ry, rings[0][1])
    for reach, colour in rings:
        sketch.disc(1.3, 0.5, 1.22 * reach, 0.45 * reach, colour)
    pixels = np.array(sketch.image)
    height, width = pixels.shape[:2]
    rough = np.tile(noise(int(rng.integers(1000)), 0.8), (1, 2))[:height, :width, None]
    pixels[..., :3] = np.clip(pixels[..., :3] * (1 + 0.035 * rough), 0, 255)
    return Image.fromarray(pixels)


@prop_of("purple rug")
def _purple_rug(rng: np.random.Generator) -> Image.Image:
    purple = pick(rng, "#7a2fa8", "#8b3fc0", "#6a2c9c")
    rings = [(1.0, 0.75), (0.93, 1.0), (0.72, 1.3), (0.65, 1.0), (0.35, 1.25), (0.28, 0.9)]
    return _rug(rng, [(reach, shade(purple, tone)) for reach, tone in rings], pile=0.05)


@prop_of("white rug")
def _white_rug(rng: np.random.Generator) -> Image.Image:
    return _rug(rng, [(1.0, "#d9d6d0"), (0.98, "#efede8"), (0.9, "#f8f6f2")], pile=0.1)


@prop_of("mirror")
def _mirror(rng: np.random.Generator) -> Image.Image:
    """Draw a round mirror in a golden frame that lies on the ground, with streaks of light."""
    sketch = Sketch(2.6, 1.0)
    for reach, colour in ((1.0, "#9a6a18"), (0.97, "#e2b13c"), (0.9, "#8fb4c8"), (0.88, "#c4e2f0")):
        sketch.disc(1.3, 0.5, 1.28 * reach, 0.48 * reach, colour)
    for left in (0.55, 1.5):
        sketch.polygon(
            [(left, 0.75), (left + 0.5, 0.2), (left + 0.66, 0.2), (left + 0.16, 0.75)], "#e9f7fd"
        )
    return sketch.image


@prop_of("person")
def _person(rng: np.random.Generator) -> Image.Image:
    """Draw somebody who walks by."""
    sketch = Sketch(0.5, 1.0)
    coat = pick(rng, "#c0392b", "#2f6fd0", "#e8b92e", "#3c8a50", "#8a45c0", "#e07a3a", "#3a4150")
    skin = pick(rng, "#f1c9a5", "#c68d5e", "#8d5a3a")
    hair = pick(rng, "#2a1d16", "#6b4222", "#d9b25a")
    for x in (0.17, 0.28):
        sketch.box(x, 0.62, x + 0.09, 0.99, "#2d3340")
    sketch.polygon([(0.12, 0.7), (0.16, 0.28), (0.36, 0.28), (0.42, 0.7)], coat)
    sketch.line([(0.15, 0.34), (0.08, 0.58)], shade(coat, 0.8), 0.07)
    sketch.line([(0.38, 0.34), (0.45, 0.58)], shade(coat, 0.8), 0.07)
    sketch.disc(0.26, 0.15, 0.1, 0.12, skin)
    sketch.polygon(
        [(0.15, 0.15), (0.17, 0.04), (0.26, 0.01), (0.36, 0.05), (0.37, 0.15), (0.26, 0.08)], hair
    )
    return sketch.image


@prop_of("moon")
def _moon(rng: np.random.Generator) -> Image.Image:
    sketch = Sketch()
    sketch.disc(0.5, 0.5, 0.48, 0.48, "#fff6cf")
    for _ in range(6):
        angle, reach, r = rng.uniform((0, 0, 0.04), (2 * math.pi, 0.32, 0.09))
        sketch.disc(0.5 + reach * math.cos(angle), 0.5 + reach * math.sin(angle), r, r, "#e9dcae")
    return sketch.image
