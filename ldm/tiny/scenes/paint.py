"""Colours, outlines and noise that the scenes are painted with."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
from PIL import ImageColor

Array = np.ndarray
Paint = str | Array  # "#rrggbb", or red, green and blue from 0 to 1
Points = Sequence[tuple[float, float]]

TILE = 256  # texels along a tile
MASTER = 192  # pixels along a prop's height as it is drawn, before it is scaled
VARIANTS = 8  # how many of each prop and tile there are
AUTUMN = ("#e8842a", "#d9541e", "#f2b233", "#c23a22", "#b5651d", "#efa02c")


def rgb(colour: str) -> Array:
    """Return red, green and blue, from 0 to 1, of a colour like "#ff8800"."""
    return np.array(ImageColor.getrgb(colour), np.float32) / 255


def mix(a: Array, b: Array, t: float | Array) -> Array:
    """Return `a` where `t` is 0, `b` where it is 1, and what is between them in between."""
    return a + (b - a) * t


def to_hex(colour: Paint) -> str:
    """Return a colour as PIL takes it."""
    if isinstance(colour, str):
        return colour
    return "#{:02x}{:02x}{:02x}".format(*(int(v) for v in np.clip(colour * 255, 0, 255)))


def shade(colour: Paint, factor: float) -> Array:
    """Return the colour darker (factor < 1) or lighter (> 1)."""
    base = rgb(colour) if isinstance(colour, str) else colour
    return base * factor if factor <= 1 else mix(base, np.ones(3), factor - 1)


def scaled(points: Points, scale: float = MASTER) -> list[tuple[float, float]]:
    """Return the points in pixels, `scale` pixels to a unit."""
    return [(scale * float(x), scale * float(y)) for x, y in points]


def leaf_outline(
    x: float, y: float, length: float, width: float, angle: float, points: int = 24
) -> Points:
    """Return the outline of a pointed ellipse around (x, y)."""
    t = np.linspace(0, 2 * math.pi, points, endpoint=False)
    u, v = length * np.cos(t), width * np.sin(t) * np.abs(np.sin(t)) ** 0.4
    c, s = math.cos(angle), math.sin(angle)
    return list(zip((x + c * u - s * v).tolist(), (y + s * u + c * v).tolist()))


@functools.lru_cache(maxsize=64)
def noise(
    seed: int, slope: float = 1.5, across: float = 1.0, along: float = 1.0, size: int = TILE
) -> Array:
    """Return periodic noise (size, size) of mean 0 and deviation 1.

    Args:
        slope: a larger one makes the noise coarser.
        across, along: stretch the noise; more than 1 makes it finer on that axis.
    """
    fy, fx = np.meshgrid(np.fft.fftfreq(size) * along, np.fft.fftfreq(size) * across, indexing="ij")
    frequency = np.hypot(fx, fy)
    frequency[0, 0] = np.inf
    white = np.fft.fft2(np.random.default_rng(seed).standard_normal((size, size)))
    field = np.fft.ifft2(white * frequency**-slope).real
    return ((field - field.mean()) / field.std()).astype(np.float32)


def grain(colour: Array, *layers: Array) -> Array:
    """Return `colour` everywhere, its brightness varied by the sum of the layers."""
    return colour * (1 + np.sum(layers, axis=0))[..., None]


def pick(rng: np.random.Generator, *colours: str) -> Array:
    """Choose one of the colours, a little darker or lighter."""
    return rgb(colours[int(rng.integers(len(colours)))]) * rng.uniform(0.93, 1.07)
