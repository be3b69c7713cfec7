"""Tiles: periodic textures (TILE, TILE, 3) from 0 to 1, laid out in perspective as a ground.

Their rows go away from the viewer. `mipmaps` caches them. A variant is the same in every process.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from ldm.tiny.scenes.paint import (
    AUTUMN,
    TILE,
    Array,
    grain,
    leaf_outline,
    mix,
    noise,
    pick,
    rgb,
    shade,
    to_hex,
)

MIPS = 6  # ever smaller copies of a tile, for what is far away
# Where each copy begins in `mipmaps`.
MIP_START = np.cumsum([0] + [(TILE >> k) ** 2 for k in range(MIPS - 1)])
# Tiles whose pattern has to run straight.
REGULAR = {"wood", "dark wood", "pavement", "cobblestone"}

TILES: dict[str, Callable[[np.random.Generator, int], Array]] = {}


def tile_of(kind: str) -> Callable:
    """Register a drawing as the tile of this name."""

    def register(draw: Callable[[np.random.Generator, int], Array]) -> Callable:
        TILES[kind] = draw
        return draw

    return register


@tile_of("grass")
def _grass(rng: np.random.Generator, seed: int) -> Array:
    green = pick(rng, "#6fb63c", "#5aa637", "#7cc142", "#4f9e3b")
    blades = noise(seed, 0.7, across=2.0, along=0.7)
    return grain(green, 0.09 * noise(seed + 1, 1.6), 0.10 * blades)


@tile_of("sand")
def _sand(rng: np.random.Generator, seed: int) -> Array:
    colour = pick(rng, "#e8cf98", "#dfc085", "#efd9a7")
    return grain(colour, 0.03 * noise(seed, 0.3), 0.045 * noise(seed + 1, 1.8))


@tile_of("snow")
def _snow(rng: np.random.Generator, seed: int) -> Array:
    drift = 0.5 + 0.22 * noise(seed, 2.0, along=1.6) + 0.04 * noise(seed + 1, 0.2)
    return mix(rgb("#cfdcf0"), rgb("#fdfeff"), np.clip(drift, 0, 1)[..., None])


@tile_of("water")
def _water(rng: np.random.Generator, seed: int) -> Array:
    deep, light = pick(rng, "#1c6fb8", "#1f7cc4", "#1a86b8"), rgb("#7fd0ee")
    waves = noise(seed, 1.5, across=0.55, along=1.3)
    crests = np.clip(noise(seed + 1, 1.1, across=0.4, along=1.4) - 1.1, 0, 1)
    water = mix(deep, light, np.clip(0.3 + 0.2 * waves, 0, 1)[..., None])
    return mix(water, rgb("#eefaff"), (0.9 * crests)[..., None])


@tile_of("milk")
def _milk(rng: np.random.Generator, seed: int) -> Array:
    waves = np.clip(0.5 + 0.3 * noise(seed, 2.0, across=0.55, along=1.2), 0, 1)[..., None]
    return mix(rgb("#e3dccb"), rgb("#fffdf6"), waves)


@tile_of("dirt")
def _dirt(rng: np.random.Generator, seed: int) -> Array:
    brown = pick(rng, "#b1804f", "#a5713f", "#bb8a5c")
    pebbles = np.clip(noise(seed + 2, 0.5) - 1.7, 0, 1)
    return grain(brown, 0.10 * noise(seed, 1.4), 0.06 * noise(seed + 1, 0.4), 0.3 * pebbles)


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
    return grain(pick(rng, "#9a9aa2", "#8b8d96", "#a7a39c"), seam, slab, 0.03 * noise(seed, 0.5))


def _planks(rng: np.random.Generator, seed: int, colour: Array, width: int = 32) -> Array:
    """Draw boards that go away from the viewer, each with its own tone, grain and joint."""
    y, x = np.mgrid[:TILE, :TILE]
    board, boards = x // width, TILE // width
    joint = rng.integers(TILE, size=boards)[board]
    tone = rng.uniform(-0.12, 0.12, boards)[board] + 0.06 * ((y - joint) % TILE > TILE // 2)
    seam = np.where((x % width < 2) | ((y - joint) % TILE < 3), -0.42, 0.0)
    fibres = np.roll(noise(seed, 1.0, across=3.0, along=0.25), 37, 0)
    return grain(colour, tone.astype(np.float32), 0.06 * fibres, seam.astype(np.float32))


@tile_of("wood")
def _wood(rng: np.random.Generator, seed: int) -> Array:
    return _planks(rng, seed, pick(rng, "#b5783f", "#a4622f", "#c68a4e", "#96582f"))


@tile_of("dark wood")
def _dark_wood(rng: np.random.Generator, seed: int) -> Array:
    return _planks(rng, seed, pick(rng, "#6d4a33", "#7b5237", "#77695e"))


def cells(rng: np.random.Generator, count: int, jitter: float) -> tuple[Array, Array, Array]:
    """Draw a periodic Voronoi pattern of `count` x `count` cells.

    Distances are in cells. Every second row is moved by half a cell.

    Returns:
        For each pixel its distance to the edge, its distance to the centre, and its cell's number.
    """
    offset = rng.uniform(-jitter, jitter, (2, count, count)).astype(np.float32)
    y, x = (np.mgrid[:TILE, :TILE] * count / TILE).astype(np.float32)
    nearest, second = np.full((2, TILE, TILE), np.inf, np.float32)
    cell = np.zeros((TILE, TILE), np.int64)
    for down in (-1, 0, 1):
        for right in (-2, -1, 0, 1):
            row, column = y.astype(int) + down, x.astype(int) + right
            number = row % count, column % count
            centre_y = row + 0.5 + offset[0][number]
            centre_x = column + 0.5 * (row % 2) + 0.5 + offset[1][number]
            distance = np.hypot(x - centre_x, y - centre_y)
            second = np.minimum(second, np.maximum(distance, nearest))
            cell = np.where(distance < nearest, number[0] * count + number[1], cell)
            nearest = np.minimum(nearest, distance)
    return second - nearest, nearest, cell


@tile_of("cobblestone")
def _cobblestone(rng: np.random.Generator, seed: int) -> Array:
    edge, centre, cell = cells(rng, count=8, jitter=0.16)
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
        colour = to_hex(shade(pick(rng, *AUTUMN), rng.uniform(0.8, 1.1)))
        # A leaf that reaches over an edge comes in again at the other one.
        for left in (x - TILE, x, x + TILE):
            for top in (y - TILE, y, y + TILE):
                if -r < left < TILE + r and -r < top < TILE + r:
                    draw.polygon(leaf_outline(left, top, r, 0.5 * r, angle), fill=colour)
    return np.asarray(ground, np.float32) / 255


@functools.cache
def mipmaps(kind: str, variant: int) -> Array:
    """Return a tile and its ever smaller copies, one after the other, as a flat array of pixels."""
    rng = np.random.default_rng([variant, *kind.encode()])
    tile = TILES[kind](rng, 1000 + 10 * variant)
    full = Image.fromarray(np.clip(tile * 255, 0, 255).astype(np.uint8)).convert("RGBA")
    levels = [np.asarray(full if k == 0 else full.reduce(1 << k)) for k in range(MIPS)]
    return np.concatenate([pixels.reshape(-1).view(np.uint32) for pixels in levels])


@functools.lru_cache(maxsize=512)
def perspective(
    n: int, horizon: int, texels: float, tilt: float
) -> tuple[Array, Array, Array, Array]:
    """Return where the pixels below the horizon lie on a tile.

    Returns:
        Columns (y, n), rows (y, 1), which of the smaller copies (y, 1), and how far away they are
        (y, 1), from 0 to 1.
    """
    y = np.arange(max(horizon, 0), n, dtype=np.float32)[:, None]
    z = (n - horizon) / (y - horizon + 0.5)  # depth: 1 at the lower edge of the picture
    scale = texels / n
    columns = (np.arange(n, dtype=np.float32) - n / 2) * z * scale
    level = np.clip(np.round(np.log2(np.maximum(scale * z**1.5, 1)) + 0.2), 0, MIPS - 1)
    rows, far = z * (n - horizon) * scale * -tilt, np.clip((z - 1.3) / 2, 0, 1)
    return columns.astype(np.int32), rows.astype(np.int32), level.astype(np.int32), far


@functools.cache
def folds(variant: int, size: int = 2 * TILE) -> Array:
    """Return the light on draped cloth, (size, size) from 0 to 1."""
    rng = np.random.default_rng([variant, 77])
    y, x = np.mgrid[:size, :size] / size
    warp = 0.09 * noise(500 + variant, 3.0, size=size)
    light = np.zeros((size, size))
    lean = rng.uniform(0.35, 0.9) * (1 if variant % 2 else -1)
    for frequency, weight in ((rng.uniform(3, 4.5), 0.65), (rng.uniform(6, 8), 0.35)):
        angle = lean + rng.uniform(-0.15, 0.15)
        phase = (frequency * (math.cos(angle) * x + math.sin(angle) * y + warp)) % 1
        # A fold rises slowly and falls steeply.
        light += weight * np.where(phase < 0.75, phase / 0.75, (1 - phase) / 0.25)
    light = (light - light.min()) / np.ptp(light)
    return (0.2 + 0.8 * light).astype(np.float32)
