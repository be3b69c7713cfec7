"""Shapes that a toy is made of, as signed distances: negative inside, positive outside.

A shape is a function from points `(3, n)` to distances `(n,)`. The y axis points up and a toy looks
towards +z. `melt` joins two shapes; `Part` gives a shape its colour.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

Array = np.ndarray
Shape = Callable[[Array], Array]
Texture = Callable[[Array], Array]  # points (3, n) -> how bright the colour is there, (n,) around 1
Vec = tuple[float, float, float]


@dataclass(frozen=True)
class Part:
    """One shape of a toy and its colour.

    `blend` melts the shape into the parts before it, `mirror` repeats it at -x, and `paint` makes
    it colour the parts before it instead of adding to them. A `texture` makes the colour uneven.
    """

    shape: Shape
    colour: str
    blend: float = 0.0
    mirror: bool = False
    paint: bool = False
    texture: Texture | None = None


# ---- points -------------------------------------------------------------------------------------


def vec(v: Vec) -> Array:
    """Return a vector as a column, so that it adds to points (3, n)."""
    return np.asarray(v, np.float32)[:, None]


def length(q: Array) -> Array:
    """Return the length of every column."""
    return np.sqrt((q * q).sum(0))


def unit(q: Array) -> Array:
    """Scale every column to length one."""
    return q / np.maximum(length(q), 1e-9)


# ---- solids -------------------------------------------------------------------------------------


def sphere(centre: Vec, radius: float) -> Shape:
    """Return a sphere."""
    return lambda p: length(p - vec(centre)) - radius


def ellipsoid(centre: Vec, radii: Vec) -> Shape:
    """Return an ellipsoid. Its distance is exact on the surface and an estimate away from it."""

    def distance(p: Array) -> Array:
        q = (p - vec(centre)) / vec(radii)
        return length(q) * (length(q) - 1) / np.maximum(length(q / vec(radii)), 1e-6)

    return distance


def capsule(start: Vec, end: Vec, radius: float, end_radius: float | None = None) -> Shape:
    """Return a rod with round ends, which may taper to `end_radius`."""
    origin, axis = vec(start), vec(end) - vec(start)
    growth = 0.0 if end_radius is None else end_radius - radius

    def distance(p: Array) -> Array:
        along = np.clip(((p - origin) * axis).sum(0) / (axis * axis).sum(), 0, 1)
        return length(p - origin - axis * along) - radius - growth * along

    return distance


def tube(
    points: list[Vec], radius: float, end_radius: float | None = None, joints: int = 12
) -> Shape:
    """Return capsules along the Bézier curve of the points, tapering evenly to `end_radius`."""
    curve, share = list(np.array(points)), np.linspace(0, 1, joints)[:, None]
    while len(curve) > 1:
        curve = [a + (b - a) * share for a, b in pairwise(curve)]
    radii = np.linspace(radius, radius if end_radius is None else end_radius, joints).tolist()
    joined = zip(pairwise(curve[0]), pairwise(radii))
    pieces = [capsule(start, end, *both) for (start, end), both in joined]
    return lambda p: np.minimum.reduce([piece(p) for piece in pieces])


def box(centre: Vec, half: Vec, rounding: float) -> Shape:
    """Return a box of half sides `half` with rounded edges."""

    def distance(p: Array) -> Array:
        q = np.abs(p - vec(centre)) - (vec(half) - rounding)
        return length(np.maximum(q, 0)) + np.minimum(q.max(0), 0) - rounding

    return distance


def torus(centre: Vec, axis: Vec, ring: float, radius: float) -> Shape:
    """Return a ring around an axis: `ring` is its radius, `radius` that of its tube."""

    def distance(p: Array) -> Array:
        q = p - vec(centre)
        along = (q * unit(vec(axis))).sum(0)
        return np.hypot(length(q - unit(vec(axis)) * along) - ring, along) - radius

    return distance


def lathe(profile: list[tuple[float, float]], wall: float = 0.0, rounding: float = 0.02) -> Shape:
    """Return the solid that a profile of (radius, height) corners sweeps around the y axis.

    With a `wall` the solid is a hollow vessel of that thickness, open at the top.
    """
    corners = np.array(profile, np.float32)
    radii, heights = _smoothed(corners[:, 0], corners[:, 1])

    def distance(p: Array) -> Array:
        around = np.hypot(p[0], p[2])
        # A slanted wall is nearer than it is at the same height.
        side = (around - np.interp(p[1], heights, radii)) * 0.75
        ends = np.maximum(heights[0] - p[1], p[1] - heights[-1])
        if wall:
            floor = np.minimum(p[1] - heights[0] - wall, np.inf)
            hollow = np.where(floor > 0, np.abs(side + wall / 2) - wall / 2, side)
            side = np.maximum(hollow, side)
        return np.maximum(side, ends) - rounding

    return distance


def _smoothed(radii: Array, heights: Array) -> tuple[Array, Array]:
    """Return a smooth line through the corners of a profile, as radii and heights.

    Two corners stay a straight line.
    """
    if len(radii) < 3:
        return radii, heights
    # Cubic Hermite curves between the corners.
    slope = np.gradient(radii, heights)
    fine = np.linspace(heights[0], heights[-1], 40)
    k = np.clip(np.searchsorted(heights, fine) - 1, 0, len(heights) - 2)
    step = heights[k + 1] - heights[k]
    t = (fine - heights[k]) / step
    ends = radii[k] * (1 - t) ** 2 * (1 + 2 * t) + radii[k + 1] * t**2 * (3 - 2 * t)
    turns = slope[k] * step * t * (1 - t) ** 2 - slope[k + 1] * step * t**2 * (1 - t)
    return np.maximum(ends + turns, 0.02), fine


def slab(centre: Vec, radii: Vec) -> Shape:
    """Return an upright cylinder with an oval ground plan, such as the sole of a shoe."""

    def distance(p: Array) -> Array:
        q = p - vec(centre)
        oval = np.hypot(q[0] / radii[0], q[2] / radii[2]) - 1
        return np.maximum(0.6 * oval * min(radii[0], radii[2]), np.abs(q[1]) - radii[1]) - 0.02

    return distance


# ---- markings, used with `paint` -----------------------------------------------------------------


def stripes(axis: int, period: float, share: float, offset: float = 0.0) -> Shape:
    """Return stripes that cover `share` of every `period` along an axis."""
    return lambda p: np.abs((p[axis] - offset) % period - period / 2) - share * period / 2


def dots(centre: Vec, around: int, spacing: float, radius: float) -> Shape:
    """Return staggered rows of dots, `around` per turn about y. Spacing and radius are angles."""

    def distance(p: Array) -> Array:
        q = unit(p - vec(centre))
        latitude = np.arcsin(q[1])
        row = np.round(latitude / spacing)
        longitude = np.arctan2(q[0], q[2]) + np.pi / around * (row % 2)
        turns = longitude / (2 * np.pi) * around
        across = (turns - np.round(turns)) * 2 * np.pi / around * np.cos(latitude)
        return np.hypot(across, latitude - row * spacing) - radius

    return distance


def star(x: float, y: float, radius: float) -> Shape:
    """Return a star of five round points on the front."""

    def distance(p: Array) -> Array:
        dx, dy = p[0] - x, p[1] - y
        edge = radius / (1.45 - 0.45 * np.cos(5 * np.arctan2(dx, dy)))
        return np.maximum(np.hypot(dx, dy) - edge, -p[2])

    return distance


def patch(shape: Shape, axis: int, sign: int = 1) -> Shape:
    """Return the part of a shape that lies on one side of the toy."""
    return lambda p: np.maximum(shape(p), -sign * p[axis])


# ---- textures ------------------------------------------------------------------------------------


def rough(p: Array, scale: float, seed: int = 0) -> Array:
    """Return smooth solid noise from 0 to 1 with lumps of size 1 / scale."""
    lattice = np.random.default_rng(seed).random((32, 32, 32), np.float32)
    q = p * scale
    low = np.floor(q).astype(int)
    f = q - low
    f = (f * f * (3 - 2 * f)).astype(np.float32)
    total = np.zeros(p.shape[1], np.float32)
    for corner in np.ndindex(2, 2, 2):
        weight = np.prod([f[k] if corner[k] else 1 - f[k] for k in range(3)], axis=0)
        x, y, z = ((low[k] + corner[k]) % 32 for k in range(3))
        total += weight * lattice[x, y, z]
    return total


def speckles(scale: float, depth: float) -> Texture:
    """Return dark specks and soft clouds, as of stoneware."""

    def texture(p: Array) -> Array:
        specks = np.clip((rough(p, scale, 1) - 0.72) * 8, 0, 1)
        return 1 - depth * specks + 0.35 * depth * (rough(p, 0.2 * scale, 2) - 0.5)

    return texture


def weave(scale: float, depth: float) -> Texture:
    """Return the threads of canvas, which cross, and worn spots."""

    def texture(p: Array) -> Array:
        threads = np.sin(scale * (p[0] + p[2])) * np.sin(scale * (p[1] + 0.5 * p[2]))
        return 1 + 0.5 * depth * threads + depth * (rough(p, 0.12 * scale, 3) - 0.5)

    return texture


def melt(old: Array, new: Array, blend: float) -> tuple[Array, Array]:
    """Join two distances and round them over `blend` where they meet.

    Returns:
        The joined distance, and the share of the new one in the surface there.
    """
    if not blend:
        return np.minimum(old, new), new < old
    share = np.clip(0.5 + 0.5 * (old - new) / blend, 0, 1)
    return old + (new - old) * share - blend * share * (1 - share), share
