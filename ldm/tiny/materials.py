"""Materials and patterns: what a thing is made of, or what is printed on it.

`MATERIALS` replace a thing's colours. `PATTERNS` keep them, and so go together with a colour word.
Both map the word of a caption to a function `(pixels, rng) -> pixels`. Pixels are a sprite's RGBA
bytes `(h, w, 4)`, not premultiplied.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

Array = np.ndarray
Random = np.random.Generator
Finish = Callable[[Array, Random], Array]

MATERIALS: dict[str, Finish] = {}
PATTERNS: dict[str, Finish] = {}


def entry(table: dict[str, Finish], word: str) -> Callable[[Finish], Finish]:
    """Register a function under the word of a caption."""

    def register(apply: Finish) -> Finish:
        table[word] = apply
        return apply

    return register


# ---- tools ---------------------------------------------------------------------------------------


def tones(pixels: Array) -> Array:
    """Return a sprite's brightness (h, w) from 0 to 1, its median at 0.5."""
    grey = pixels[..., :3].astype(np.float32) @ np.array([0.3, 0.59, 0.11], np.float32)
    visible = pixels[..., 3] > 127
    if not visible.any():
        return np.full(grey.shape, 0.5, np.float32)
    low, middle, high = np.percentile(grey[visible], (3, 50, 97))
    dark = (grey - middle) / max(middle - low, 50)
    bright = (grey - middle) / max(high - middle, 50)
    return np.clip(0.5 + 0.5 * np.where(grey < middle, dark, bright), 0, 1)


def ramp(tone: Array, *colours: tuple[float, float, float]) -> Array:
    """Return a colour (h, w, 3), 0 to 255, for every tone from 0 to 1.

    The colours given are evenly spaced over the tones, the first at 0 and the last at 1.
    """
    places = np.linspace(0, 1, len(colours))
    table = np.array(colours, np.float32)
    return np.stack([np.interp(tone, places, table[:, k]) for k in range(3)], -1)


def with_colour(pixels: Array, colour: Array, alpha: Array | None = None) -> Array:
    """Return the sprite in new colours (h, w, 3), and with a new alpha (h, w) if it is given."""
    opacity = pixels[..., 3] if alpha is None else alpha
    return np.dstack([np.clip(colour, 0, 255), opacity]).astype(np.uint8)


@functools.lru_cache(maxsize=16)
def grain(
    seed: int, across: float = 1.0, along: float = 1.0, slope: float = 1.2, size: int = 256
) -> Array:
    """Return periodic noise (size, size) of mean 0 and deviation 1.

    Args:
        across, along: stretch the noise; more than 1 makes it finer on that axis.
        slope: a larger one makes the noise coarser.
    """
    fy, fx = np.meshgrid(np.fft.fftfreq(size) * along, np.fft.fftfreq(size) * across, indexing="ij")
    frequency = np.hypot(fx, fy)
    frequency[0, 0] = np.inf
    white = np.fft.fft2(np.random.default_rng(seed).standard_normal((size, size)))
    field = np.fft.ifft2(white * frequency**-slope).real
    return ((field - field.mean()) / field.std()).astype(np.float32)


def window(rng: Random, field: Array, shape: tuple[int, ...]) -> Array:
    """Cut a piece of the given shape from a periodic field, at a random place."""
    top, left = rng.integers(len(field), size=2)
    rows = (top + np.arange(shape[0])) % len(field)
    columns = (left + np.arange(shape[1])) % len(field)
    return field[rows[:, None], columns]


def rim(alpha: Array, width: int) -> Array:
    """Return 1 at the outline of a sprite, falling to 0 `width` pixels inside."""
    inside = alpha.astype(np.float32) / 255
    # Two box filters blur the sprite: it is darker the nearer its outline is.
    soft = inside
    for _ in range(2):
        total = np.cumsum(np.pad(soft, ((width, width), (0, 0)), mode="constant"), 0)
        soft = (total[2 * width :] - total[: -2 * width]) / (2 * width)
        total = np.cumsum(np.pad(soft, ((0, 0), (width, width)), mode="constant"), 1)
        soft = (total[:, 2 * width :] - total[:, : -2 * width]) / (2 * width)
    return np.clip((1 - soft) * 2, 0, 1) * inside


# ---- materials -----------------------------------------------------------------------------------


@entry(MATERIALS, "wooden")
def wooden(pixels: Array, rng: Random) -> Array:
    """Make the thing of wood, with its rings."""
    height, width = pixels.shape[:2]
    y, x = np.mgrid[:height, :width] / max(height, width)
    bend = window(rng, grain(1, slope=2.2), (height, width))
    rings = np.sin(2 * np.pi * (6.5 * (y + 0.25 * (x - 0.5) ** 2) + 0.28 * bend))
    tone = tones(pixels)
    base = ramp(tone, (62, 33, 14), (170, 108, 58), (226, 176, 118))
    fibres = window(rng, grain(2, 0.3, 3.0), (height, width))
    brightness = 1 + 0.17 * rings + 0.03 * fibres
    return with_colour(pixels, base * brightness[..., None])


@entry(MATERIALS, "golden")
def golden(pixels: Array, rng: Random) -> Array:
    """Make the thing of gold: dark edges and bright reflections."""
    return _metal(
        pixels, rng, (74, 40, 2), (168, 112, 8), (238, 184, 34), (255, 226, 92), (255, 250, 214)
    )


@entry(MATERIALS, "silver")
def silver(pixels: Array, rng: Random) -> Array:
    """Make the thing of silver."""
    greys = ((38, 42, 50), (104, 112, 124), (172, 180, 190), (222, 228, 234), (255, 255, 255))
    return _metal(pixels, rng, *greys)


def _metal(pixels: Array, rng: Random, *colours: tuple[float, float, float]) -> Array:
    """Make the thing of a metal of these colours, dark to light, which reflects in waves."""
    height, width = pixels.shape[:2]
    y = np.arange(height)[:, None] / height
    bend = window(rng, grain(3, slope=2.4), (height, width))
    reflection = np.sin(2 * np.pi * (1.7 * y + 0.16 * bend + rng.uniform(0, 1)))
    tone = 0.62 * tones(pixels) + 0.12 + 0.2 * reflection - 0.25 * rim(pixels[..., 3], 4) + 0.1
    return with_colour(pixels, ramp(np.clip(tone, 0, 1), *colours))


@entry(MATERIALS, "stone")
def stone(pixels: Array, rng: Random) -> Array:
    """Make the thing of grey stone with specks and cracks."""
    shape = pixels.shape[:2]
    rough = window(rng, grain(4, slope=0.7), shape)
    blotches = window(rng, grain(5, slope=1.9), shape)
    cracks = np.clip(1.2 - 9 * np.abs(window(rng, grain(6, slope=2.0), shape)), 0, 1)
    tone = np.clip(0.72 * tones(pixels) + 0.12 + 0.05 * blotches, 0, 1)
    base = ramp(tone, (58, 58, 60), (134, 132, 128), (198, 196, 190))
    return with_colour(pixels, base * (1 + 0.09 * rough - 0.38 * cracks)[..., None])


@entry(MATERIALS, "glass")
def glass(pixels: Array, rng: Random) -> Array:
    """Make the thing of pale glass: the scene shows through, the outline shines."""
    tone, alpha = tones(pixels), pixels[..., 3].astype(np.float32)
    edge = rim(pixels[..., 3], 6)
    height, width = pixels.shape[:2]
    y, x = np.mgrid[:height, :width] / max(height, width)
    gleam = np.exp(-(((x + 0.6 * y - rng.uniform(0.45, 0.65)) / 0.05) ** 2))
    colour = ramp(np.clip(tone + 0.25, 0, 1), (70, 128, 158), (150, 208, 228), (232, 248, 255))
    shine = np.clip(0.9 * gleam + 0.4 * (edge > 0.75), 0, 1)[..., None]
    colour = colour + (255 - colour) * shine
    opacity = np.clip(0.30 + 0.45 * edge + 0.3 * (1 - tone) + 0.5 * gleam, 0, 0.95)
    return with_colour(pixels, colour, alpha * opacity)


# ---- patterns ------------------------------------------------------------------------------------


@entry(PATTERNS, "striped")
def striped(pixels: Array, rng: Random) -> Array:
    """Print broad stripes."""
    height, width = pixels.shape[:2]
    y, x = np.mgrid[:height, :width] / max(height, width)
    angle = rng.choice([0.0, np.pi / 2, np.pi / 4, -np.pi / 4]) + rng.normal(0, 0.08)
    along = x * np.cos(angle) + y * np.sin(angle)
    wave = np.sin(2 * np.pi * (along * rng.uniform(4.5, 6.0) + rng.uniform(0, 1)))
    return _printed(pixels, np.clip(3 * wave + 0.4, 0, 1))


@entry(PATTERNS, "spotted")
def spotted(pixels: Array, rng: Random) -> Array:
    """Print round spots in staggered rows."""
    height, width = pixels.shape[:2]
    across = rng.uniform(5.0, 6.0)  # spots along the longer side
    y, x = np.mgrid[:height, :width] / max(height, width) * across + rng.uniform(0, 1, (2, 1, 1))
    row = np.floor(y)
    distance = np.hypot((x + 0.5 * (row % 2)) % 1 - 0.5, y - row - 0.5)
    return _printed(pixels, np.clip((0.31 - distance) * 14, 0, 1))


@entry(PATTERNS, "checkered")
def checkered(pixels: Array, rng: Random) -> Array:
    """Print a chequerboard."""
    height, width = pixels.shape[:2]
    across = rng.uniform(3.2, 4.0)  # fields along the longer side
    place = np.mgrid[:height, :width] / max(height, width) * across * np.pi
    y, x = place + rng.uniform(0, 3, (2, 1, 1))
    return _printed(pixels, np.clip(9 * np.sin(x) * np.sin(y) + 0.5, 0, 1))


def _printed(pixels: Array, cover: Array) -> Array:
    """Print on the thing where `cover` (h, w) is 1; its own colours stay where it is 0.

    The ink is dark on a light thing and white on a dark one.
    """
    straight = pixels[..., :3].astype(np.float32)
    visible = pixels[..., 3] > 127
    grey = straight @ np.array([0.3, 0.59, 0.11], np.float32)
    middle = float(np.median(grey[visible])) if visible.any() else 128.0
    light = tones(pixels)[..., None]
    if middle > 118:
        ink = straight * 0.16 + 12
    else:
        ink = 175 + 75 * light + 0 * straight
    return with_colour(pixels, straight + (ink - straight) * 0.93 * cover[..., None])
