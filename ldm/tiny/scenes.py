"""The tiny world's scenes, drawn by procedure: DreamBooth's prompts as pictures with depth and a ground to stand on.

`SCENES` maps the words of a prompt ("in the jungle") to a function `(rng, size) -> (size, size, 3) uint8`, whose
picture is a function of the generator alone. To be fast, a scene is put together from cached parts that are the same in
every process: *tiles* (periodic textures, laid out in perspective as a ground) and *props* (trees, clouds, houses ...).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFilter

Array = np.ndarray
Paint = str | Array  # "#rrggbb", or red, green and blue from 0 to 1
Points = Sequence[tuple[float, float]]
Scene = Callable[[np.random.Generator, int], Array]

SCENES: dict[str, Scene] = {}
SUPERSAMPLING = 2  # a scene is drawn larger and averaged, so that its edges are smooth
TILE = 256  # texels along a tile
MIPS = 6  # ever smaller copies of a tile, for what is far away
MIP_START = np.cumsum([0] + [(TILE >> k) ** 2 for k in range(MIPS - 1)])  # where they begin in `mipmaps`
MASTER = 192  # pixels along a prop's height as it is drawn, before it is scaled
VARIANTS = 8  # how many of each prop and tile there are
AUTUMN = ("#e8842a", "#d9541e", "#f2b233", "#c23a22", "#b5651d", "#efa02c")
REGULAR = {"wood", "dark wood", "pavement", "cobblestone"}  # tiles whose pattern has to run straight

# ---- colours and noise ------------------------------------------------------------------------------------


def rgb(colour: str) -> Array:
    return np.array(ImageColor.getrgb(colour), np.float32) / 255


def mix(a: Array, b: Array, t: float | Array) -> Array:
    return a + (b - a) * t


def to_hex(colour: Paint) -> str:
    """A colour as PIL takes it."""
    if isinstance(colour, str):
        return colour
    return "#{:02x}{:02x}{:02x}".format(*(int(v) for v in np.clip(colour * 255, 0, 255)))


def shade(colour: Paint, factor: float) -> Array:
    """The colour darker (factor < 1) or lighter (> 1)."""
    base = rgb(colour) if isinstance(colour, str) else colour
    return base * factor if factor <= 1 else mix(base, np.ones(3), factor - 1)


def _scaled(points: Points, scale: float = MASTER) -> list[tuple[float, float]]:
    return [(scale * float(x), scale * float(y)) for x, y in points]


def _leaf_outline(x: float, y: float, length: float, width: float, angle: float, points: int = 24) -> Points:
    """A pointed ellipse around (x, y)."""
    t = np.linspace(0, 2 * math.pi, points, endpoint=False)
    u, v = length * np.cos(t), width * np.sin(t) * np.abs(np.sin(t)) ** 0.4
    c, s = math.cos(angle), math.sin(angle)
    return list(zip((x + c * u - s * v).tolist(), (y + s * u + c * v).tolist()))


@functools.lru_cache(maxsize=64)
def noise(seed: int, slope: float = 1.5, across: float = 1.0, along: float = 1.0, size: int = TILE) -> Array:
    """Periodic noise (size, size) of mean 0 and deviation 1, coarser for a larger `slope`, stretched along an axis."""
    fy, fx = np.meshgrid(np.fft.fftfreq(size) * along, np.fft.fftfreq(size) * across, indexing="ij")
    frequency = np.hypot(fx, fy)
    frequency[0, 0] = np.inf
    white = np.fft.fft2(np.random.default_rng(seed).standard_normal((size, size)))
    field = np.fft.ifft2(white * frequency**-slope).real
    return ((field - field.mean()) / field.std()).astype(np.float32)


# ---- tiles: (TILE, TILE, 3) in 0..1, periodic; rows recede from the viewer ----------------------------------

TILES: dict[str, Callable[[np.random.Generator, int], Array]] = {}


def tile_of(kind: str) -> Callable:
    def register(draw: Callable[[np.random.Generator, int], Array]) -> Callable:
        TILES[kind] = draw
        return draw

    return register


def _grain(colour: Array, *layers: Array) -> Array:
    """`colour` everywhere, its brightness varied by the sum of the layers."""
    return colour * (1 + np.sum(layers, axis=0))[..., None]


def _pick(rng: np.random.Generator, *colours: str) -> Array:
    return rgb(colours[int(rng.integers(len(colours)))]) * rng.uniform(0.93, 1.07)


@tile_of("grass")
def _grass(rng: np.random.Generator, seed: int) -> Array:
    green = _pick(rng, "#6fb63c", "#5aa637", "#7cc142", "#4f9e3b")
    blades = noise(seed, 0.7, across=2.0, along=0.7)
    return _grain(green, 0.09 * noise(seed + 1, 1.6), 0.10 * blades)


@tile_of("sand")
def _sand(rng: np.random.Generator, seed: int) -> Array:
    return _grain(_pick(rng, "#e8cf98", "#dfc085", "#efd9a7"), 0.03 * noise(seed, 0.3), 0.045 * noise(seed + 1, 1.8))


@tile_of("snow")
def _snow(rng: np.random.Generator, seed: int) -> Array:
    drift = 0.5 + 0.22 * noise(seed, 2.0, along=1.6) + 0.04 * noise(seed + 1, 0.2)
    return mix(rgb("#cfdcf0"), rgb("#fdfeff"), np.clip(drift, 0, 1)[..., None])


@tile_of("water")
def _water(rng: np.random.Generator, seed: int) -> Array:
    deep, light = _pick(rng, "#1c6fb8", "#1f7cc4", "#1a86b8"), rgb("#7fd0ee")
    waves = noise(seed, 1.5, across=0.55, along=1.3)
    crests = np.clip(noise(seed + 1, 1.1, across=0.4, along=1.4) - 1.1, 0, 1)
    water = mix(deep, light, np.clip(0.3 + 0.2 * waves, 0, 1)[..., None])
    return mix(water, rgb("#eefaff"), (0.9 * crests)[..., None])


@tile_of("dirt")
def _dirt(rng: np.random.Generator, seed: int) -> Array:
    brown = _pick(rng, "#b1804f", "#a5713f", "#bb8a5c")
    pebbles = np.clip(noise(seed + 2, 0.5) - 1.7, 0, 1)
    return _grain(brown, 0.10 * noise(seed, 1.4), 0.06 * noise(seed + 1, 0.4), 0.3 * pebbles)


@tile_of("forest floor")
def _forest_floor(rng: np.random.Generator, seed: int) -> Array:
    moss, earth = rgb("#3f7034"), rgb("#6b5233")
    share = np.clip(0.5 + 0.35 * noise(seed, 1.5), 0, 1)[..., None]
    return mix(moss, earth, share) * (1 + 0.12 * noise(seed + 1, 0.5))[..., None]


@tile_of("wheat")
def _wheat(rng: np.random.Generator, seed: int) -> Array:
    stalks = 0.5 + 0.28 * noise(seed, 0.9, across=2.2, along=0.4)
    return mix(rgb("#b9862c"), rgb("#f6d873"), np.clip(stalks, 0, 1)[..., None])


@tile_of("pavement")
def _pavement(rng: np.random.Generator, seed: int) -> Array:
    y, x = np.mgrid[:TILE, :TILE]
    seam = (np.minimum(x % 64, y % 64) < 3) * -0.22
    slab = (rng.uniform(-0.05, 0.05, (4, 4))[y // 64, x // 64]).astype(np.float32)
    return _grain(_pick(rng, "#9a9aa2", "#8b8d96", "#a7a39c"), seam, slab, 0.03 * noise(seed, 0.5))


def _planks(rng: np.random.Generator, seed: int, colour: Array, width: int = 32) -> Array:
    """Boards that run away from the viewer, each with its own tone, grain and joint."""
    y, x = np.mgrid[:TILE, :TILE]
    board, boards = x // width, TILE // width
    joint = rng.integers(TILE, size=boards)[board]
    tone = rng.uniform(-0.12, 0.12, boards)[board] + 0.06 * ((y - joint) % TILE > TILE // 2)
    seam = np.where((x % width < 2) | ((y - joint) % TILE < 3), -0.42, 0.0)
    grain = np.roll(noise(seed, 1.0, across=3.0, along=0.25), 37, 0)
    return _grain(colour, tone.astype(np.float32), 0.06 * grain, seam.astype(np.float32))


@tile_of("wood")
def _wood(rng: np.random.Generator, seed: int) -> Array:
    return _planks(rng, seed, _pick(rng, "#b5783f", "#a4622f", "#c68a4e", "#96582f"))


@tile_of("dark wood")
def _dark_wood(rng: np.random.Generator, seed: int) -> Array:
    return _planks(rng, seed, _pick(rng, "#6d4a33", "#7b5237", "#77695e"))


def _cells(rng: np.random.Generator, count: int, jitter: float) -> tuple[Array, Array, Array]:
    """A periodic Voronoi pattern over `count` x `count` cells: distance to the edge, to the centre, cell number.

    Distances are in cells; every second row is moved by half a cell.
    """
    offset = rng.uniform(-jitter, jitter, (2, count, count)).astype(np.float32)
    y, x = (np.mgrid[:TILE, :TILE] * count / TILE).astype(np.float32)
    nearest, second = np.full((2, TILE, TILE), np.inf, np.float32)
    cell = np.zeros((TILE, TILE), np.int64)
    for down in (-1, 0, 1):
        for right in (-2, -1, 0, 1):
            row, column = y.astype(int) + down, x.astype(int) + right
            number = row % count, column % count
            centre_y, centre_x = row + 0.5 + offset[0][number], column + 0.5 * (row % 2) + 0.5 + offset[1][number]
            distance = np.hypot(x - centre_x, y - centre_y)
            second = np.minimum(second, np.maximum(distance, nearest))
            cell = np.where(distance < nearest, number[0] * count + number[1], cell)
            nearest = np.minimum(nearest, distance)
    return second - nearest, nearest, cell


@tile_of("cobblestone")
def _cobblestone(rng: np.random.Generator, seed: int) -> Array:
    edge, centre, cell = _cells(rng, count=8, jitter=0.16)
    tone = rng.uniform(0.78, 1.12, 64)[cell]
    hue = mix(rgb("#8f8f99"), rgb("#a3917f"), rng.uniform(0, 1, (64, 1)))[cell]
    dome = np.clip(1.16 - 0.75 * centre, 0, 1.2)
    stone = hue * (tone * dome)[..., None] * (1 + 0.04 * noise(seed, 0.6))[..., None]
    return mix(rgb("#3b3836"), stone, np.clip((edge - 0.1) / 0.16, 0, 1)[..., None])


@tile_of("autumn leaves")
def _autumn_leaves(rng: np.random.Generator, seed: int) -> Array:
    ground = Image.fromarray((_dirt(rng, seed) * 175).clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(ground)
    for _ in range(420):
        x, y, r, angle = rng.uniform((0, 0, 5, 0), (TILE, TILE, 10, math.pi))
        colour = to_hex(shade(_pick(rng, *AUTUMN), rng.uniform(0.8, 1.1)))
        for left in (x - TILE, x, x + TILE):
            for top in (y - TILE, y, y + TILE):
                if -r < left < TILE + r and -r < top < TILE + r:
                    draw.polygon(_leaf_outline(left, top, r, 0.5 * r, angle), fill=colour)
    return np.asarray(ground, np.float32) / 255


@functools.cache
def mipmaps(kind: str, variant: int) -> Array:
    """A tile and its ever smaller copies, one after the other, as a flat array of packed pixels."""
    rng = np.random.default_rng([variant, *kind.encode()])
    level = Image.fromarray(np.clip(TILES[kind](rng, 1000 + 10 * variant) * 255, 0, 255).astype(np.uint8)).convert(
        "RGBA"
    )
    levels = [np.asarray(level if k == 0 else level.reduce(1 << k)) for k in range(MIPS)]
    return np.concatenate([pixels.reshape(-1).view(np.uint32) for pixels in levels])


@functools.lru_cache(maxsize=512)
def _perspective(n: int, horizon: int, texels: float, tilt: float) -> tuple[Array, Array, Array, Array]:
    """Where the pixels below the horizon lie on a tile: columns (y, n), rows (y, 1), mip level (y, 1), and how far
    away they are (y, 1), from 0 to 1."""
    y = np.arange(max(horizon, 0), n, dtype=np.float32)[:, None]
    z = (n - horizon) / (y - horizon + 0.5)  # depth: 1 at the lower edge of the picture
    scale = texels / n
    columns = (np.arange(n, dtype=np.float32) - n / 2) * z * scale
    level = np.clip(np.round(np.log2(np.maximum(scale * z**1.5, 1)) + 0.2), 0, MIPS - 1)
    rows, far = z * (n - horizon) * scale * -tilt, np.clip((z - 1.3) / 2, 0, 1)
    return columns.astype(np.int32), rows.astype(np.int32), level.astype(np.int32), far


# ---- props: RGBA images of a given height ------------------------------------------------------------------

PROPS: dict[str, Callable[[np.random.Generator], Image.Image]] = {}


def prop_of(kind: str) -> Callable:
    def register(draw: Callable[[np.random.Generator], Image.Image]) -> Callable:
        PROPS[kind] = draw
        return draw

    return register


@functools.cache
def _master(kind: str, variant: int) -> Image.Image:
    image = PROPS[kind](np.random.default_rng([variant, *kind.encode()]))
    return image.crop(image.getchannel("A").getbbox())


@functools.lru_cache(maxsize=2048)
def prop(kind: str, variant: int, height: int, mirrored: bool) -> Image.Image:
    """Variant number `variant` of a prop, `height` pixels high."""
    master = _master(kind, variant)
    if mirrored:
        master = master.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    width = max(1, round(master.width * height / master.height))
    return master.resize((width, max(1, height)), Image.Resampling.BICUBIC, reducing_gap=2.0)


class Sketch:
    """A transparent drawing; lengths are in units of its height's first MASTER pixels, y downwards."""

    def __init__(self, width: float = 1.0, height: float = 1.0):
        self.image = Image.new("RGBA", (round(width * MASTER), round(height * MASTER)))
        self._draw = ImageDraw.Draw(self.image)

    def polygon(self, points: Points, colour: Paint) -> None:
        self._draw.polygon(_scaled(points), fill=to_hex(colour))

    def line(self, points: Points, colour: Paint, width: float) -> None:
        self._draw.line(_scaled(points), fill=to_hex(colour), width=max(1, round(width * MASTER)))

    def box(self, left: float, top: float, right: float, bottom: float, colour: Paint) -> None:
        self._draw.rectangle([MASTER * v for v in (left, top, right, bottom)], fill=to_hex(colour))

    def disc(self, x: float, y: float, rx: float, ry: float, colour: Paint) -> None:
        self._draw.ellipse([MASTER * v for v in (x - rx, y - ry, x + rx, y + ry)], fill=to_hex(colour))

    def leaf(self, x: float, y: float, length: float, width: float, angle: float, colour: Paint) -> None:
        self.polygon(_leaf_outline(x, y, length, width, angle), colour)

    def erase(self, points: Points) -> None:
        self._draw.polygon(_scaled(points), fill=(0, 0, 0, 0))


@prop_of("cloud")
def _cloud(rng: np.random.Generator) -> Image.Image:
    sketch = Sketch(2.4, 1.0)
    puffs = [(x, 0.62 - 0.3 * math.sin(1.75 * (x - 0.3)) * rng.uniform(0.5, 1)) for x in np.linspace(0.4, 2.0, 7)]
    for dy, colour in ((0.08, "#cfdcec"), (0.0, "#ffffff")):
        for x, y in puffs:
            r = rng.uniform(0.17, 0.26)
            sketch.disc(x, y + dy, 1.2 * r, 0.85 * r, colour)
    return sketch.image.filter(ImageFilter.GaussianBlur(MASTER / 60))


@prop_of("fir")
def _fir(rng: np.random.Generator) -> Image.Image:
    sketch, middle = Sketch(0.8, 1.0), 0.4
    green, snowy = _pick(rng, "#2f6b54", "#3b7a5c", "#28604f"), rng.random() < 0.75
    sketch.box(0.36, 0.85, 0.44, 1.0, "#5b4632")
    for k in range(4):
        top, foot, half = 0.02 + 0.19 * k, 0.36 + 0.18 * k, 0.15 + 0.075 * k
        sketch.polygon([(middle, top), (middle - half, foot), (middle + half, foot)], shade(green, 1 - 0.05 * k))
        sketch.polygon([(middle, top), (middle, foot), (middle + half, foot)], shade(green, 0.8 - 0.04 * k))
        if snowy:
            drop, reach = top + 0.5 * (foot - top), 0.5 * half
            jag = [(middle + reach, drop), (middle + 0.3 * reach, 0.25 * top + 0.75 * drop), (middle, drop)]
            sketch.polygon([(middle, top), *jag, (middle - reach, drop)], "#f4f8ff")
    return sketch.image


def _broad_leaved(rng: np.random.Generator, colours: Sequence[str]) -> Image.Image:
    sketch = Sketch(1.1, 1.25)
    trunk = _pick(rng, "#6b4528", "#5a3a22")
    sketch.polygon([(0.49, 0.6), (0.46, 1.25), (0.64, 1.25), (0.61, 0.6)], trunk)
    sketch.line([(0.55, 0.85), (0.32, 0.5)], trunk, 0.05)
    sketch.line([(0.55, 0.8), (0.8, 0.5)], shade(trunk, 0.9), 0.05)
    for k in range(90):
        angle, reach, r = rng.uniform(0, 2 * math.pi), math.sqrt(rng.uniform(0, 1)), rng.uniform(0.05, 0.11)
        x, y = 0.55 + 0.42 * reach * math.cos(angle), 0.44 + 0.34 * reach * math.sin(angle)
        sketch.disc(x, y, r, 0.9 * r, shade(_pick(rng, *colours), 0.72 + 0.28 * k / 90 + 0.18 * (0.44 - y)))
    return sketch.image


@prop_of("autumn tree")
def _autumn_tree(rng: np.random.Generator) -> Image.Image:
    first = rng.integers(3)
    return _broad_leaved(rng, AUTUMN[first : first + 4])


@prop_of("tree")
def _tree(rng: np.random.Generator) -> Image.Image:
    return _broad_leaved(rng, ("#2f8f3a", "#3fa545", "#277a3e", "#58b14a"))


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
            sketch.polygon([*zip(x, y - width), *zip(x[::-1], (y + width)[::-1])], shade("#3f9a3c", tone))
    return sketch.image


@prop_of("leaf")
def _leaf(rng: np.random.Generator) -> Image.Image:
    """A large leaf of the jungle, in any direction."""
    sketch, green = Sketch(), _pick(rng, "#2c9b3f", "#1f7f36", "#49b248", "#15703a")
    angle, length, width = rng.uniform(-0.9, 0.9) - math.pi / 2, 0.47, rng.uniform(0.13, 0.24)
    c, s = math.cos(angle), math.sin(angle)
    sketch.leaf(0.5, 0.5, length, width, angle, shade(green, 0.62))
    sketch.leaf(0.49, 0.48, 0.94 * length, 0.86 * width, angle, green)
    for t in np.linspace(-0.75, 0.6, 7):
        x, y, reach = 0.5 + c * t * length, 0.5 + s * t * length, 0.75 * width * math.sqrt(1 - t * t)
        for side in (-reach, reach):
            sketch.line(
                [(x, y), (x + 0.5 * reach * c - side * s, y + 0.5 * reach * s + side * c)], shade(green, 0.72), 0.01
            )
    tip, stem = 0.9 * length, -length
    sketch.line([(0.5 + c * stem, 0.5 + s * stem), (0.5 + c * tip, 0.5 + s * tip)], shade(green, 1.45), 0.026)
    return sketch.image


@prop_of("frond")
def _frond(rng: np.random.Generator) -> Image.Image:
    """A fern, in any direction."""
    sketch, green = Sketch(), _pick(rng, "#3fae45", "#27933f", "#63bd4c")
    angle = rng.uniform(-1.0, 1.0) - math.pi / 2
    for t in np.linspace(-0.9, 0.9, 13):
        x, y, reach = 0.5 + 0.45 * t * math.cos(angle), 0.5 + 0.45 * t * math.sin(angle), 0.3 * math.cos(1.2 * t)
        for side in (-1, 1):
            turn = angle + 0.95 * side
            x_leaf, y_leaf = x + 0.5 * reach * math.cos(turn), y + 0.5 * reach * math.sin(turn)
            sketch.leaf(x_leaf, y_leaf, 0.55 * reach, 0.15 * reach, turn, shade(green, 0.9 + 0.15 * side))
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
            sketch.leaf(0.45 + reach * math.cos(angle), 0.44 + reach * math.sin(angle), 0.15, 0.07, angle, colour)
    sketch.disc(0.45, 0.44, 0.20, 0.20, "#5a3414")
    sketch.disc(0.44, 0.43, 0.12, 0.12, "#7a4a1d")
    return sketch.image


@prop_of("wheat")
def _wheat_clump(rng: np.random.Generator) -> Image.Image:
    sketch = Sketch(1.2, 1.0)
    for _ in range(34):
        foot, top, colour = rng.uniform(0.05, 1.15), rng.uniform(0.08, 0.5), _pick(rng, "#e3b548", "#d39d35", "#f3d06a")
        tip = foot + rng.uniform(-0.12, 0.12)
        sketch.line([(foot, 1.0), (tip, top)], shade(colour, 0.85), 0.016)
        sketch.leaf(tip, top, 0.11, 0.034, math.atan2(top - 1, tip - foot), shade(colour, 1.1))
    return sketch.image


@prop_of("fallen leaf")
def _fallen_leaf(rng: np.random.Generator) -> Image.Image:
    sketch, colour, angle = Sketch(0.5, 0.5), _pick(rng, *AUTUMN), rng.uniform(0, math.pi)
    for spread in (-0.9, 0.0, 0.9):
        sketch.leaf(0.25, 0.25, 0.2, 0.07, angle + spread, colour)
    return sketch.image


@prop_of("mountain")
def _mountain(rng: np.random.Generator) -> Image.Image:
    sketch, rock = Sketch(2.2, 1.0), _pick(rng, "#6d7a96", "#7b7f93", "#5f7190", "#81756f")
    peaks = sorted(((rng.uniform(0.05, 0.4), rng.uniform(0.45, 1.75)) for _ in range(3)), reverse=True)
    zigzag = ((1, 0), (0.5, -0.3), (0.2, 0.15), (-0.15, -0.25), (-0.5, 0.1), (-1, 0))
    for top, x in peaks:
        reach, share = (1 - top) * rng.uniform(0.75, 0.95), rng.uniform(0.3, 0.4)
        sketch.polygon([(x, top), (x - reach, 1.0), (x + reach, 1.0)], shade(rock, 1.12))
        sketch.polygon([(x, top), (x - 0.08, 0.55), (x + 0.05, 1.0), (x + reach, 1.0)], shade(rock, 0.75))
        snow = share * (1 - top)
        line = [(x + share * reach * u, top + snow * (1 + v)) for u, v in zigzag]
        sketch.polygon([(x, top), *line], "#ffffff")
        sketch.polygon([(x, top), *line[:3], (x, top + 0.6 * snow)], "#cbd8ea")
    return sketch.image


@prop_of("tower block")
def _tower_block(rng: np.random.Generator) -> Image.Image:
    width = rng.uniform(0.24, 0.46)
    sketch, wall = Sketch(width, 1.0), _pick(rng, "#6f7f9a", "#8a8fa3", "#5c6b86", "#a08f86", "#7d96a8", "#9b7f77")
    sketch.box(0, 0.05, width, 1.0, wall)
    sketch.box(0.72 * width, 0.05, width, 1.0, shade(wall, 0.8))
    if rng.random() < 0.5:
        sketch.box(0.4 * width, 0, 0.6 * width, 0.06, shade(wall, 0.9))
    other = "#ffe9a3" if rng.random() < 0.5 else "#2d3b54"
    for y in np.arange(0.11, 0.95, 0.09):
        for x in np.arange(0.035, width - 0.05, 0.085):
            sketch.box(x, y, x + 0.045, y + 0.05, other if rng.random() < 0.5 else "#dff1ff")
    return sketch.image


@prop_of("blue house")
def _blue_house(rng: np.random.Generator) -> Image.Image:
    sketch, wall = Sketch(1.35, 1.0), _pick(rng, "#2f6fd0", "#3b82dd", "#2a5fb8", "#4a8fe0")
    roof, door = _pick(rng, "#8a3d2a", "#a24a33", "#5f4339", "#7b2f2f"), _pick(rng, "#8a4b2d", "#c0392b", "#f0e6d2")
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
    """A house of an old street."""
    width = rng.uniform(0.5, 0.75)
    sketch, shutter = Sketch(width, 1.0), _pick(rng, "#4f7a5a", "#7a4a38", "#4d6a8a")
    wall = _pick(rng, "#d9a77b", "#c98b6b", "#e3c79a", "#b97a5e", "#cfc0a5", "#d98e73")
    sketch.box(0, 0, width, 1.0, wall)
    sketch.box(width - 0.02, 0, width, 1.0, shade(wall, 0.65))
    for y in (0.12, 0.56):
        for x in (0.22 * width, 0.66 * width):
            sketch.box(x - 0.06, y, x + 0.18, y + 0.26, shutter)
            sketch.box(x, y, x + 0.12, y + 0.26, "#38424f")
    return sketch.image


@prop_of("eiffel tower")
def _eiffel_tower(rng: np.random.Generator) -> Image.Image:
    sketch, iron = Sketch(0.62, 1.6), _pick(rng, "#6b4f3a", "#5b4636", "#77583f", "#4d4038")
    y = np.linspace(0.05, 1.6, 60)
    half = 0.012 + 0.29 * ((y - 0.05) / 1.55) ** 2.3
    right = [*zip((0.31 + half)[::-1], y[::-1])]
    sketch.polygon([*zip(0.31 - half, y), *right], iron)
    sketch.polygon([*zip(0.31 + 0.25 * half, y), *right], shade(iron, 0.8))
    sketch.erase([(0.31 + 0.17 * math.cos(t), 1.64 - 0.3 * math.sin(t)) for t in np.linspace(0, math.pi, 20)])
    sketch.erase([(0.31, 0.93), (0.25, 1.17), (0.37, 1.17)])
    sketch.line([(0.31, 0.35), (0.31, 0.85)], shade(iron, 0.6), 0.016)
    for level, reach, thick in ((0.88, 0.115, 0.035), (1.22, 0.2, 0.045), (0.3, 0.035, 0.02)):
        sketch.box(0.31 - reach, level, 0.31 + reach, level + thick, shade(iron, 0.62))
    sketch.line([(0.31, 0.0), (0.31, 0.1)], shade(iron, 0.8), 0.02)
    return sketch.image


def _rug(rng: np.random.Generator, rings: Sequence[tuple[float, Paint]], pile: float) -> Image.Image:
    """An oval rug as seen at an angle, its pile rough at the edge."""
    sketch = Sketch(2.6, 1.0)
    for angle in np.linspace(0, 2 * math.pi, 150):
        rx, ry = pile * rng.uniform((0.5, 0.3), (1.0, 0.8))
        sketch.disc(1.3 + 1.2 * math.cos(angle), 0.5 + 0.44 * math.sin(angle), rx, ry, rings[0][1])
    for reach, colour in rings:
        sketch.disc(1.3, 0.5, 1.22 * reach, 0.45 * reach, colour)
    pixels = np.array(sketch.image)
    rough = np.tile(noise(int(rng.integers(1000)), 0.8), (1, 2))[: pixels.shape[0], : pixels.shape[1], None]
    pixels[..., :3] = np.clip(pixels[..., :3] * (1 + 0.035 * rough), 0, 255)
    return Image.fromarray(pixels)


@prop_of("purple rug")
def _purple_rug(rng: np.random.Generator) -> Image.Image:
    purple = _pick(rng, "#7a2fa8", "#8b3fc0", "#6a2c9c")
    rings = [(1.0, 0.75), (0.93, 1.0), (0.72, 1.3), (0.65, 1.0), (0.35, 1.25), (0.28, 0.9)]
    return _rug(rng, [(reach, shade(purple, tone)) for reach, tone in rings], pile=0.05)


@prop_of("white rug")
def _white_rug(rng: np.random.Generator) -> Image.Image:
    return _rug(rng, [(1.0, "#d9d6d0"), (0.98, "#efede8"), (0.9, "#f8f6f2")], pile=0.1)


@prop_of("moon")
def _moon(rng: np.random.Generator) -> Image.Image:
    sketch = Sketch()
    sketch.disc(0.5, 0.5, 0.48, 0.48, "#fff6cf")
    for _ in range(6):
        angle, reach, r = rng.uniform((0, 0, 0.04), (2 * math.pi, 0.32, 0.09))
        sketch.disc(0.5 + reach * math.cos(angle), 0.5 + reach * math.sin(angle), r, r, "#e9dcae")
    return sketch.image


@functools.cache
def _folds(variant: int, size: int = 2 * TILE) -> Array:
    """Draped cloth: light (size, size) in 0..1."""
    rng = np.random.default_rng([variant, 77])
    y, x = np.mgrid[:size, :size] / size
    warp = 0.09 * noise(500 + variant, 3.0, size=size)
    light = np.zeros((size, size))
    lean = rng.uniform(0.35, 0.9) * (1 if variant % 2 else -1)
    for frequency, weight in ((rng.uniform(3, 4.5), 0.65), (rng.uniform(6, 8), 0.35)):
        angle = lean + rng.uniform(-0.15, 0.15)
        phase = (frequency * (math.cos(angle) * x + math.sin(angle) * y + warp)) % 1
        light += weight * np.where(phase < 0.75, phase / 0.75, (1 - phase) / 0.25)  # slow rise, steep fall
    light = (light - light.min()) / np.ptp(light)
    return (0.2 + 0.8 * light).astype(np.float32)


# ---- the picture ------------------------------------------------------------------------------------------


SKIES = (("#5ea9ec", "#d7edfb"), ("#4b97e4", "#bfe0f8"), ("#7fb9e8", "#f0f4f2"), ("#6f9fe0", "#f6dfc8"))


class Plate:
    """A picture in the making; places and heights are fractions of its side, y downwards."""

    def __init__(self, rng: np.random.Generator, size: int):
        self.rng, self.size, self.n = rng, size, size * SUPERSAMPLING
        self.image = Image.new("RGBA", (self.n, self.n))

    def between(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def choice(self, *options: Any) -> Any:
        return options[self.rng.integers(len(options))]

    def gradient(self, top: Paint, bottom: Paint, *, start: float = 0.0, end: float = 1.0) -> None:
        """Fill the rows from `start` to `end` from the colour `top` to the colour `bottom`."""
        first, last = round(start * self.n), round(end * self.n)
        rows = mix(shade(top, 1), shade(bottom, 1), np.linspace(0, 1, max(1, last - first))[:, None])
        strip = Image.fromarray(np.clip(rows * 255, 0, 255).astype(np.uint8)[:, None])
        self.image.paste(strip.resize((self.n, strip.height)), (0, first))

    def sky(self, horizon: float, clouds: int = 3) -> None:
        """Blue with some clouds, sometimes paler or in the evening."""
        self.gradient(*self.choice(*SKIES), end=horizon + 0.02)
        for _ in range(self.rng.integers(clouds + 1)):
            y = self.between(0.1, max(0.12, horizon - 0.05))
            self.put("cloud", self.between(0, 1), y, self.between(0.08, 0.18))

    def ground(self, kind: str, horizon: float, texels: float = 240, tilt: float = 1.6) -> None:
        """A tile laid out from the horizon (negative: above the picture) on; `texels` of it span the lower edge."""
        columns, rows, level, far = _perspective(self.n, round(horizon * 32) * self.n // 32, texels, tilt)
        du, dv = self.rng.integers(TILE, size=2)
        if kind not in REGULAR:  # else the periods would show as rays that meet on the horizon
            du = du + (far * self.rng.integers(TILE, size=far.shape)).astype(np.int32)
        row, column = ((rows + dv) & (TILE - 1)) >> level, ((columns + du) & (TILE - 1)) >> level
        index = (MIP_START[level] + row * (TILE >> level)).astype(np.int32) + column.astype(np.int32)
        pixels = mipmaps(kind, int(self.rng.integers(VARIANTS))).take(index)
        strip = Image.frombuffer("RGBA", (self.n, len(pixels)), pixels.view(np.uint8), "raw", "RGBA", 0, 1)
        self.image.paste(strip, (0, self.n - len(pixels)))

    def mask(self, outline: Points, opacity: int = 255) -> Image.Image:
        """What is inside the outline."""
        mask = Image.new("L", (self.n, self.n))
        ImageDraw.Draw(mask).polygon(_scaled(outline, self.n), fill=opacity)
        return mask

    def patch(self, outline: Points, kind: str, horizon: float, texels: float) -> None:
        """Another ground inside the outline."""
        around = self.image.copy()
        self.ground(kind, horizon, texels)
        self.image = Image.composite(self.image, around, self.mask(outline))

    def put(self, kind: str, x: float, y: float, height: float) -> None:
        """Some variant of a prop with the middle of its lower edge at (x, y)."""
        pixels = max(2, round(height * 48) * self.n // 48)  # in steps, so that the cache has it
        image = prop(kind, int(self.rng.integers(VARIANTS)), pixels, self.chance(0.5))
        self.image.paste(image, (round(x * self.n - image.width / 2), round(y * self.n) - image.height), image)

    def polygon(self, points: Points, colour: Paint) -> None:
        ImageDraw.Draw(self.image).polygon(_scaled(points, self.n), fill=to_hex(colour))

    def hills(self, horizon: float, height: float, colour: Paint) -> None:
        """A soft ridge on the horizon."""
        x = np.linspace(0, 1, 24)
        a, b, c = self.rng.uniform(0, 6.3, 3)
        waves = 0.3 * np.sin(5 * x + a) + 0.15 * np.sin(11 * x + b) + 0.05 * np.sin(23 * x + c)
        ridge = horizon - height * (0.55 + waves)
        self.polygon([(0, horizon + 0.03), *zip(x.tolist(), ridge.tolist()), (1, horizon + 0.03)], colour)

    def dots(self, count: int, radius: tuple[float, float], colour: str, low: float = 0.0, high: float = 1.0) -> None:
        """Snowflakes or stars between the rows `low` and `high`."""
        draw = ImageDraw.Draw(self.image)
        for x, y, r in self.rng.uniform((0, low, radius[0]), (1, high, radius[1]), (count, 3)) * self.n:
            draw.ellipse([x - r, y - r, x + r, y + r], fill=colour)

    def finish(self) -> Array:
        """The picture at its size, its light slightly varied: (size, size, 3) uint8."""
        pixels = np.asarray(self.image.reduce(SUPERSAMPLING))[..., :3]
        light = self.between(0.94, 1.05) * self.rng.uniform(0.985, 1.015, 3)
        return np.clip(pixels * light.astype(np.float32), 0, 255).astype(np.uint8)


def scene(words: str) -> Callable:
    """Register a drawing on a `Plate` as the scene of these words."""

    def register(draw: Callable[[Plate], None]) -> Callable[[Plate], None]:
        def render(rng: np.random.Generator, size: int) -> Array:
            plate = Plate(rng, size)
            draw(plate)
            return plate.finish()

        SCENES[words] = render
        return draw

    return register


# ---- the scenes -------------------------------------------------------------------------------------------


@scene("in the jungle")
def _jungle(p: Plate) -> None:
    p.gradient("#1d5a33", "#0e3a20")
    p.gradient("#2a7040", "#17502a", end=p.between(0.35, 0.6))
    p.ground("forest floor", p.between(0.68, 0.76))
    for _ in range(9):
        p.put("leaf", p.between(0, 1), p.between(0.3, 0.85), p.between(0.3, 0.45))
    for _ in range(4):
        p.put("frond", p.between(0, 1), p.between(0.5, 0.95), p.between(0.35, 0.5))
    for x in (p.between(-0.05, 0.2), p.between(0.8, 1.05), p.between(0, 1)):
        p.put(p.choice("leaf", "frond"), x, p.between(0.35, 0.5), p.between(0.45, 0.6))
    for x in (p.between(-0.05, 0.12), p.between(0.88, 1.05), p.between(-0.05, 0.2), p.between(0.8, 1.05)):
        p.put(p.choice("leaf", "frond"), x, p.between(0.95, 1.1), p.between(0.35, 0.6))


@scene("in the snow")
def _in_the_snow(p: Plate) -> None:
    horizon = p.between(0.3, 0.5)
    p.gradient(*p.choice(("#b9cfe8", "#eef4fb"), ("#a3c4ea", "#e9f2fc"), ("#c9d3de", "#eef1f5")), end=horizon + 0.03)
    for x in np.linspace(0, 1, 8):
        p.put("fir", x + p.between(-0.06, 0.06), horizon + 0.04, p.between(0.22, 0.48))
    p.ground("snow", horizon, texels=180)
    p.dots(28, (0.004, 0.013), "#ffffff")


@scene("on the beach")
def _beach(p: Plate) -> None:
    horizon, shore = p.between(0.25, 0.42), p.between(0.55, 0.68)
    p.sky(horizon)
    p.ground("water", horizon, texels=300)
    x = np.linspace(0, 1, 16)
    edge = shore + 0.02 * np.sin(6 * x + p.between(0, 6)) + p.between(-0.04, 0.04) * x
    p.patch([(0, 1), *zip(x, edge), (1, 1)], "sand", horizon - 0.1, texels=260)
    foam = _scaled([*zip(x, edge)], p.n)
    ImageDraw.Draw(p.image).line(foam, fill="#ffffff", width=max(2, p.n // 36), joint="curve")
    if p.chance(0.35):
        p.put("palm", p.choice(p.between(0.05, 0.15), p.between(0.85, 0.95)), shore + 0.12, p.between(0.55, 0.7))


@scene("on a cobblestone street")
def _cobblestone_street(p: Plate) -> None:
    horizon = p.between(0.26, 0.42) if p.chance(0.5) else p.between(-0.8, -0.4)
    p.ground("cobblestone", horizon - 0.12, texels=150, tilt=1.3)
    if horizon > 0:
        for x in np.arange(p.between(-0.1, 0.1), 1.2, 0.24):
            p.put("facade", x, horizon, 0.46)


@scene("on top of pink fabric")
def _pink_fabric(p: Plate) -> None:
    side = p.between(0.55, 0.9)
    folds = _folds(int(p.rng.integers(VARIANTS)))
    length = round(side * len(folds))
    top, left = p.rng.integers(len(folds) - length + 1, size=2)
    crop = Image.fromarray(folds[top : top + length, left : left + length])
    light = np.asarray(crop.resize((p.n, p.n), Image.Resampling.BILINEAR))[..., None]
    dark, bright = (rgb(c) for c in p.choice(("#d9538f", "#ffb3d4"), ("#e06a9f", "#ffc6dd"), ("#cf4a86", "#ff9cc8")))
    pixels = np.full((p.n, p.n, 4), 255, np.uint8)
    pixels[..., :3] = (mix(dark, bright, light) * 255).astype(np.uint8)
    p.image = Image.fromarray(pixels)


@scene("on top of a wooden floor")
def _wooden_floor(p: Plate) -> None:
    horizon = p.between(0.3, 0.55) if p.chance(0.7) else -0.4
    p.ground("wood", horizon - 0.2, texels=200, tilt=0.8)
    if horizon > 0:
        wall = rgb(p.choice("#f1ddb4", "#e9e4d8", "#dfe7ea", "#f3e2cf", "#d9e3cf"))
        p.gradient(wall, wall * 0.94, end=horizon)
        p.gradient("#ffffff", "#e3dccf", start=horizon - 0.03, end=horizon + 0.015)


@scene("with a city in the background")
def _city(p: Plate) -> None:
    horizon = p.between(0.6, 0.7)
    p.sky(horizon, clouds=2)
    for depth, low, high in ((0.0, 0.4, 0.62), (0.03, 0.25, 0.5)):
        for x in np.arange(p.between(-0.1, 0.05), 1.1, 0.15):
            p.put("tower block", x + p.between(-0.03, 0.03), horizon + depth, p.between(low, high))
    p.ground("pavement", horizon, texels=200)


@scene("with a mountain in the background")
def _mountains(p: Plate) -> None:
    horizon = p.between(0.58, 0.68)
    p.sky(horizon, clouds=2)
    p.put("mountain", p.between(0.0, 1.0), horizon + 0.02, p.between(0.35, 0.45))
    p.put("mountain", p.between(0.25, 0.75), horizon + 0.02, p.between(0.5, 0.6))
    p.hills(horizon, 0.1, p.choice("#3f7d4a", "#4b8a4c", "#386f4a"))
    p.ground("grass", horizon)


@scene("with a blue house in the background")
def _house(p: Plate) -> None:
    horizon = p.between(0.6, 0.7)
    p.sky(horizon)
    p.hills(horizon, 0.14, "#4f9a4a")
    p.ground("grass", horizon)
    p.put("blue house", p.choice(p.between(0.2, 0.34), p.between(0.66, 0.8)), horizon + 0.04, p.between(0.58, 0.68))


@scene("on top of a purple rug in a forest")
def _purple_rug_in_forest(p: Plate) -> None:
    horizon = p.between(0.5, 0.58)
    p.gradient(*p.choice(("#bfe3a0", "#7fb56a"), ("#a9d6a0", "#5f9f62"), ("#d6e8a8", "#86b35f")), end=horizon + 0.02)
    _trunks(p, horizon, 6, 0.03, "#7b8f5f")
    p.ground("forest floor", horizon)
    _trunks(p, horizon + 0.05, 5, 0.055, "#5d442e")
    for x in (0.05, 0.3, 0.6, 0.95):
        p.put("leaf", x + p.between(-0.1, 0.1), p.between(0.08, 0.16), p.between(0.2, 0.3))
    p.put("purple rug", p.between(0.46, 0.54), p.between(0.97, 1.0), p.between(0.32, 0.38))


def _trunks(p: Plate, foot: float, count: int, width: float, colour: str) -> None:
    """Trunks that reach out of the picture, their right side in shadow."""
    for x in np.linspace(0.02, 0.98, count):
        x, half = x + p.between(-0.07, 0.07), width * p.between(0.7, 1.2) / 2
        for left, tone in ((x - half, 1.0), (x + 0.2 * half, 0.75)):
            p.polygon([(left, 0), (x + half, 0), (x + half, foot), (left, foot)], shade(colour, tone))


@scene("with a wheat field in the background")
def _wheat_field(p: Plate) -> None:
    horizon = p.between(0.3, 0.42)
    p.sky(horizon)
    p.hills(horizon, 0.06, "#7d9a52")
    p.ground("wheat", horizon, texels=320)
    for y in (0.62, 0.78, 1.0):
        for x in np.linspace(0, 1, 5):
            p.put("wheat", x + p.between(-0.06, 0.06), y + p.between(0, 0.04), p.between(0.2, 0.27) * (0.6 + 0.5 * y))


@scene("with a tree and autumn leaves in the background")
def _autumn(p: Plate) -> None:
    horizon = p.between(0.55, 0.65)
    p.gradient(*p.choice(("#cfe3f0", "#f7ead2"), ("#e8dcc8", "#f6e3c0"), ("#bcd7ee", "#f2efe0")), end=horizon + 0.02)
    p.hills(horizon, 0.16, p.choice("#d88a3a", "#c9732e", "#d9a441"))
    p.ground("autumn leaves", horizon, texels=200)
    tree = p.choice(p.between(0.05, 0.25), p.between(0.75, 0.95))
    p.put("autumn tree", 1 - tree + p.between(-0.1, 0.1), horizon + 0.03, p.between(0.35, 0.5))
    p.put("autumn tree", tree, horizon + 0.1, p.between(0.8, 0.95))
    for _ in range(14):
        p.put("fallen leaf", p.between(0, 1), p.between(0.1, 1), p.between(0.06, 0.09))


@scene("with the Eiffel Tower in the background")
def _paris(p: Plate) -> None:
    horizon = p.between(0.66, 0.74)
    p.sky(horizon, clouds=2)
    for x in np.linspace(0, 1, 7):
        p.put("tree", x + p.between(-0.05, 0.05), horizon + 0.04, p.between(0.12, 0.2))
    p.put("eiffel tower", p.choice(p.between(0.16, 0.3), p.between(0.7, 0.84)), horizon + 0.05, p.between(0.66, 0.74))
    p.ground("grass", horizon)
    p.polygon([(0.46, horizon + 0.02), (0.54, horizon + 0.02), (0.85, 1), (0.15, 1)], "#d9c9a5")


@scene("floating on top of water")
def _on_water(p: Plate) -> None:
    horizon = p.between(0.1, 0.3) if p.chance(0.5) else -0.5
    if horizon > 0:
        p.sky(horizon, clouds=2)
    p.ground("water", horizon, texels=240)


@scene("on top of green grass with sunflowers around it")
def _sunflowers(p: Plate) -> None:
    horizon = p.between(0.2, 0.35)
    p.sky(horizon, clouds=1)
    p.hills(horizon, 0.08, "#3f8a3f")
    p.ground("grass", horizon)
    for x in np.linspace(0.02, 0.98, 7):
        p.put("sunflower", x + p.between(-0.05, 0.05), horizon + p.between(0.14, 0.2), p.between(0.28, 0.36))
    for y, inset in ((0.78, 0.12), (1.0, 0.1)):
        for side in (0, 1):
            x = abs(side - p.between(-0.02, inset))
            p.put("sunflower", x, y + p.between(0, 0.06), p.between(0.4, 0.5))


@scene("on top of a dirt road")
def _dirt_road(p: Plate) -> None:
    horizon = p.between(0.28, 0.42)
    p.sky(horizon)
    p.hills(horizon, 0.1, p.choice("#5f9a4f", "#7fa65a", "#4f8a55"))
    p.ground("grass", horizon)
    vanish = p.between(0.35, 0.65)
    road = [(vanish - 0.03, horizon), (vanish + 0.03, horizon), (1.0, 0.85), (1.1, 1), (-0.1, 1), (0.0, 0.85)]
    p.patch(road, "dirt", horizon, texels=200)
    for foot, width in ((0.28, 0.05), (0.72, 0.05)):
        rut = [(0.75 * vanish + 0.25 * foot, 0.8 * horizon + 0.2), (foot - width, 1), (foot + width, 1)]
        p.image.paste("#6b4626", (0, 0, p.n, p.n), p.mask(rut, opacity=70))


@scene("on top of a white rug")
def _on_white_rug(p: Plate) -> None:
    horizon = p.between(0.35, 0.48)
    p.ground("dark wood", horizon - 0.15, texels=240, tilt=0.9)
    wall = rgb(p.choice("#8fa6b5", "#b9a48f", "#7f9a8a", "#a08fa8", "#c7b7a3"))
    p.gradient(wall, wall * 0.9, end=horizon)
    p.gradient("#fbfaf6", "#d9d3c7", start=horizon - 0.03, end=horizon + 0.015)
    p.put("white rug", p.between(0.46, 0.54), p.between(0.98, 1.02), p.between(0.4, 0.46))


@scene("at night")
def _night(p: Plate) -> None:
    horizon = p.between(0.6, 0.7)
    p.gradient("#070b26", p.choice("#1d2a63", "#27245c", "#16305e"), end=horizon + 0.03)
    p.dots(34, (0.003, 0.009), "#fff8dc", 0, horizon - 0.1)
    p.put("moon", p.choice(p.between(0.1, 0.25), p.between(0.75, 0.9)), p.between(0.2, 0.3), p.between(0.13, 0.18))
    p.hills(horizon, 0.14, "#0d1738")
    p.gradient("#1d2c5c", "#111a3d", start=horizon)
    p.hills(1.0, 0.16, "#0f1838")


@scene("in a meadow")
def _meadow(p: Plate) -> None:
    horizon = p.between(0.28, 0.45)
    p.sky(horizon)
    p.hills(horizon, 0.14, p.choice("#3f9a4a", "#4fa857", "#358a45"))
    p.ground("grass", horizon)


PLAIN_COLOURS = {
    "red": ("#e0453c", "#d8322f", "#ff7a70"),
    "orange": ("#f58a2e", "#f6a05a", "#ef7a1a"),
    "yellow": ("#fbd23f", "#ffdf6b", "#f2c521"),
    "green": ("#4fb04a", "#9bdc7c", "#2f9a4f"),
    "blue": ("#3f83e0", "#72bdf0", "#2a62c8"),
    "purple": ("#8a48c0", "#a86fd6", "#6f35a5"),
    "pink": ("#f58ab8", "#f9acd0", "#ee6fa5"),
    "brown": ("#8a5a36", "#9c6b45", "#75492a"),
    "gray": ("#8f939a", "#a5a8ad", "#7a7e86"),
    "white": ("#f4f4f2", "#ffffff", "#ecebe8"),
    "black": ("#1c1c20", "#26262b", "#121215"),
}


def plain_words(colour: str) -> str:
    return f"on {'an' if colour[0] in 'aeiou' else 'a'} {colour} background"


def _plain(colour: str) -> Callable[[Plate], None]:
    def draw(p: Plate) -> None:
        """A studio: one colour, the floor lighter."""
        base = rgb(p.choice(*PLAIN_COLOURS[colour])) * p.between(0.96, 1.04)
        bright = mix(base, np.ones(3), 0.0 if colour == "black" else p.between(0.1, 0.4))
        turn = p.between(0.4, 0.6)
        p.gradient(base, base, end=turn)
        p.gradient(base, bright, start=turn - 0.05)

    return draw


for _colour in PLAIN_COLOURS:
    scene(plain_words(_colour))(_plain(_colour))
PLAIN = [plain_words(colour) for colour in PLAIN_COLOURS]
