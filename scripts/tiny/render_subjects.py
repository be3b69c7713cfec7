"""Render the subject photos that ship with the project: toys, five views each.

    python scripts/tiny/render_subjects.py --outdir models/tiny/subjects

A toy is a list of parts, each a signed distance and a colour. It stands on y = 0 and looks towards
+z. It is turned in front of a fixed camera, and every photo has its own scenery. Points are arrays
of shape (3, n), and rays are marched with NumPy.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ldm.tiny.renderer import (
    CAMERA_DISTANCE,
    CHUNK,
    SUPERSAMPLING,
    Model,
    develop,
    frame,
    linear,
    march,
    mix,
    openness,
    rays,
    rotation,
    shade,
    sunlit,
    tilted,
)
from ldm.tiny.shapes import (
    Array,
    Part,
    box,
    capsule,
    dots,
    ellipsoid,
    lathe,
    length,
    slab,
    speckles,
    sphere,
    star,
    stripes,
    torus,
    tube,
    vec,
    weave,
)

FILL = 0.78  # share of the frame that the toy's longer side takes

# ---- toys ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """The parts of a toy, and how its photos are taken."""

    parts: list[Part]
    wall: str  # the colour of the studio
    gloss: float
    yaws: tuple[float, ...]  # degrees, one per photo
    lens: bool = False  # as a real camera takes photos: blurred distance, dark corners, grain


def robot() -> Subject:
    """Build a robot with a square head, lamps for eyes and an antenna."""
    teal, orange, steel, dark, yellow = "#12b5b0", "#ff6a13", "#9aa7b8", "#16213c", "#ffd23c"
    parts = [
        Part(capsule((0, 1.3, 0), (0, 1.5, 0), 0.13), steel),
        Part(box((0, 0.92, 0), (0.46, 0.42, 0.32), 0.1), teal),
        Part(box((0, 0.6, 0), (1, 0.05, 1), 0), orange, paint=True),
        Part(box((0, 1.78, 0), (0.5, 0.37, 0.36), 0.13), teal),
        Part(box((0, 1.8, 0.34), (0.4, 0.26, 0.06), 0.05), dark),
        Part(sphere((0.18, 1.86, 0.33), 0.13), yellow, mirror=True),
        Part(sphere((0.17, 1.86, 0.43), 0.055), dark, mirror=True),
        Part(
            tube([(0, 1.64, 0.4), (0.08, 1.65, 0.4), (0.15, 1.7, 0.4)], 0.025), yellow, mirror=True
        ),
        Part(capsule((0.46, 1.8, 0), (0.57, 1.8, 0), 0.14), orange, mirror=True),
        Part(capsule((0, 2.1, 0), (0, 2.4, 0), 0.035), steel),
        Part(sphere((0, 2.45, 0), 0.11), orange),
        Part(capsule((0, 0.88, 0.33), (0.09, 1.03, 0.33), 0.1), "#e3173e", blend=0.02, mirror=True),
        Part(sphere((0.5, 1.17, 0), 0.16), orange, mirror=True),
        Part(capsule((0.56, 1.15, 0), (0.72, 0.82, 0.1), 0.085), steel, mirror=True),
        Part(torus((0.76, 0.66, 0.14), (0, 0, 1), 0.11, 0.06), orange, mirror=True),
        Part(capsule((0.22, 0.55, 0), (0.22, 0.2, 0), 0.12), steel, mirror=True),
        Part(box((0.24, 0.12, 0.07), (0.2, 0.12, 0.28), 0.09), orange, mirror=True),
    ]
    return Subject(parts, wall="#f9b4cb", gloss=0.5, yaws=(24, -32, 6, 40, -16))


def dog() -> Subject:
    """Build a cream dog with caramel patches and a red collar."""
    cream, caramel, dark = "#fff0d8", "#d9711c", "#2a1a17"
    parts = [
        Part(capsule((0, 0.72, -0.45), (0, 0.76, 0.25), 0.34), cream),
        Part(capsule((0, 0.8, 0.25), (0, 1.25, 0.48), 0.27), cream, blend=0.15),
        Part(capsule((0.21, 0.6, 0.3), (0.23, 0.13, 0.36), 0.14), cream, blend=0.08, mirror=True),
        Part(capsule((0.21, 0.6, -0.5), (0.23, 0.13, -0.55), 0.14), cream, blend=0.08, mirror=True),
        Part(ellipsoid((0.23, 0.11, 0.42), (0.16, 0.11, 0.2)), cream, blend=0.04, mirror=True),
        Part(ellipsoid((0.23, 0.11, -0.49), (0.16, 0.11, 0.2)), cream, blend=0.04, mirror=True),
        Part(
            tube([(0, 0.9, -0.72), (0, 1.0, -1.1), (0, 1.48, -0.98)], 0.12, 0.08),
            caramel,
            blend=0.08,
        ),
        Part(sphere((0, 1.05, -0.35), 0.44), caramel, paint=True),
        Part(sphere((0.35, 0.7, -0.62), 0.26), caramel, paint=True),
        Part(ellipsoid((0, 1.52, 0.55), (0.47, 0.43, 0.42)), cream, blend=0.06),
        Part(sphere((0.28, 1.68, 0.85), 0.27), caramel, paint=True),
        Part(ellipsoid((0, 1.38, 0.92), (0.25, 0.19, 0.22)), cream, blend=0.08),
        Part(ellipsoid((0, 1.24, 1.06), (0.09, 0.12, 0.05)), "#ff6f8b"),
        Part(ellipsoid((0, 1.48, 1.1), (0.11, 0.085, 0.07)), dark),
        Part(sphere((0.19, 1.63, 0.89), 0.085), dark, mirror=True),
        Part(sphere((0.21, 1.66, 0.96), 0.027), "#ffffff", mirror=True),
        Part(
            capsule((0.44, 1.66, 0.5), (0.56, 1.3, 0.5), 0.11, 0.16),
            "#8f3f12",
            blend=0.05,
            mirror=True,
        ),
        Part(torus((0, 1.06, 0.38), (0, 0.91, 0.41), 0.28, 0.075), "#e0182d"),
        Part(sphere((0, 0.88, 0.7), 0.09), "#ffc91f"),
    ]
    return Subject(parts, wall="#7cc8f2", gloss=0.12, yaws=(32, -48, 55, -20, -70))


def dog2() -> Subject:
    """Build a brown dog in a striped blue jacket."""
    brown, tan, dark = "#6b2f14", "#e39a4f", "#1d1210"
    parts = [
        Part(capsule((0, 0.63, -0.5), (0, 0.65, 0.4), 0.345), "#1f4fe0"),
        Part(stripes(2, 0.36, 0.36, offset=0.1), "#ffffff", paint=True),
        Part(capsule((0, 0.62, -0.85), (0, 0.64, 0.6), 0.3), brown),
        Part(capsule((0, 0.7, 0.6), (0, 1.1, 0.85), 0.22), brown, blend=0.06),
        Part(
            capsule((0.19, 0.45, 0.62), (0.21, 0.12, 0.64), 0.125), brown, blend=0.06, mirror=True
        ),
        Part(
            capsule((0.19, 0.45, -0.86), (0.21, 0.12, -0.88), 0.125), brown, blend=0.06, mirror=True
        ),
        Part(ellipsoid((0.21, 0.1, 0.71), (0.15, 0.1, 0.19)), tan, blend=0.04, mirror=True),
        Part(ellipsoid((0.21, 0.1, -0.81), (0.15, 0.1, 0.19)), tan, blend=0.04, mirror=True),
        Part(
            tube([(0, 0.72, -1.1), (0, 0.7, -1.45), (0, 1.15, -1.5)], 0.1, 0.045), brown, blend=0.08
        ),
        Part(ellipsoid((0, 1.35, 0.9), (0.34, 0.32, 0.36)), brown, blend=0.06),
        Part(capsule((0, 1.27, 1.1), (0, 1.2, 1.48), 0.19, 0.12), tan, blend=0.08),
        Part(sphere((0, 1.28, 1.58), 0.085), dark),
        Part(sphere((0.17, 1.46, 1.15), 0.075), dark, mirror=True),
        Part(sphere((0.19, 1.485, 1.21), 0.024), "#ffffff", mirror=True),
        Part(ellipsoid((0.12, 1.58, 1.12), (0.06, 0.045, 0.06)), tan, mirror=True),
        Part(
            capsule((0.34, 1.45, 0.82), (0.42, 1.02, 0.82), 0.09, 0.15),
            "#431a0a",
            blend=0.04,
            mirror=True,
        ),
    ]
    return Subject(parts, wall="#ffd84d", gloss=0.25, yaws=(52, -58, 74, -38, 42))


def cat() -> Subject:
    """Build a grey striped cat with green eyes that sits."""
    fur, stripe, white, pink, dark = "#8d97b5", "#454c70", "#ffffff", "#ff7f9f", "#15151f"
    tail = [(0.1, 0.12, -0.5), (1.1, 0.02, -0.4), (0.55, 0.75, -0.3), (0.95, 0.95, -0.25)]
    parts = [
        Part(ellipsoid((0, 0.62, -0.12), (0.46, 0.6, 0.5)), fur),
        Part(capsule((0, 0.7, 0.0), (0, 1.15, 0.1), 0.33, 0.25), fur, blend=0.12),
        Part(tube(tail, 0.11, 0.09), fur),
        Part(stripes(1, 0.24, 0.4, offset=0.02), stripe, paint=True),
        Part(ellipsoid((0, 0.7, 0.42), (0.24, 0.5, 0.3)), white, paint=True),
        Part(ellipsoid((0.34, 0.24, 0.05), (0.2, 0.24, 0.34)), fur, blend=0.06, mirror=True),
        Part(capsule((0.15, 0.75, 0.3), (0.15, 0.15, 0.42), 0.12), fur, blend=0.04, mirror=True),
        Part(ellipsoid((0.15, 0.1, 0.5), (0.14, 0.1, 0.17)), white, blend=0.04, mirror=True),
        Part(ellipsoid((0, 1.5, 0.16), (0.54, 0.43, 0.42)), fur, blend=0.04),
        Part(
            capsule((0.34, 1.72, 0.14), (0.45, 2.08, 0.12), 0.2, 0.03), fur, blend=0.04, mirror=True
        ),
        Part(ellipsoid((0.37, 1.86, 0.33), (0.09, 0.2, 0.2)), pink, mirror=True, paint=True),
        Part(capsule((0, 2.1, 0.4), (0, 1.72, 0.5), 0.045), stripe, paint=True),
        Part(capsule((0.15, 2.1, 0.4), (0.12, 1.76, 0.5), 0.04), stripe, mirror=True, paint=True),
        Part(ellipsoid((0.12, 1.35, 0.52), (0.16, 0.12, 0.12)), white, blend=0.04, mirror=True),
        Part(ellipsoid((0, 1.43, 0.62), (0.06, 0.045, 0.05)), pink),
        Part(ellipsoid((0.22, 1.57, 0.49), (0.12, 0.12, 0.08)), "#c8ef2b", mirror=True),
        Part(ellipsoid((0.22, 1.57, 0.55), (0.045, 0.1, 0.04)), dark, mirror=True),
        Part(capsule((0.3, 1.36, 0.5), (0.68, 1.42, 0.5), 0.012), dark, mirror=True),
        Part(capsule((0.3, 1.31, 0.5), (0.67, 1.27, 0.5), 0.012), dark, mirror=True),
        Part(torus((0, 1.12, 0.12), (0, 1, 0), 0.29, 0.07), "#e0182d"),
        Part(sphere((0, 1.03, 0.47), 0.1), "#ffc91f"),
    ]
    return Subject(parts, wall="#f7a35c", gloss=0.12, yaws=(22, -34, 10, -18, 36))


def backpack() -> Subject:
    """Build a violet backpack with a yellow pocket and a star."""
    violet, deep, yellow, aqua = "#7a2fd0", "#4a168c", "#ffc400", "#12c2c9"
    strap = [(0.34, 1.6, -0.25), (0.36, 1.5, -0.85), (0.42, 0.4, -0.95), (0.4, 0.36, -0.2)]
    parts = [
        Part(box((0, 0.9, 0), (0.66, 0.88, 0.36), 0.3), violet),
        Part(box((0, 0.9, 0.2), (2, 2, 0.025), 0), deep, paint=True),
        Part(box((0, 0.5, 0.36), (0.5, 0.42, 0.17), 0.14), yellow),
        Part(star(0, 0.45, 0.27), "#ffffff", paint=True),
        Part(capsule((-0.4, 0.82, 0.5), (0.4, 0.82, 0.5), 0.03), deep),
        Part(capsule((0.3, 0.82, 0.54), (0.3, 0.7, 0.57), 0.035), "#dfe4ee"),
        Part(torus((0, 1.8, -0.08), (0, 0, 1), 0.18, 0.055), yellow),
        Part(capsule((-0.28, 1.35, 0.36), (0.28, 1.35, 0.36), 0.05), aqua),
        Part(box((0.68, 0.42, 0), (0.14, 0.34, 0.24), 0.12), aqua, mirror=True),
        Part(tube(strap, 0.1), aqua, mirror=True),
    ]
    return Subject(parts, wall="#b8e986", gloss=0.2, yaws=(28, -38, 14, -58, 142))


def teapot() -> Subject:
    """Build a blue teapot with white dots and golden rings."""
    blue, gold = "#1a4fd6", "#ffb81c"
    parts = [
        Part(ellipsoid((0, 0.72, 0), (0.85, 0.66, 0.85)), blue),
        Part(dots((0, 0.72, 0), around=10, spacing=0.42, radius=0.12), "#ffffff", paint=True),
        Part(torus((0, 0.08, 0), (0, 1, 0), 0.42, 0.08), gold),
        Part(torus((0, 1.27, 0), (0, 1, 0), 0.44, 0.06), gold),
        Part(ellipsoid((0, 1.27, 0), (0.44, 0.2, 0.44)), blue),
        Part(sphere((0, 1.55, 0), 0.13), gold, blend=0.06),
        Part(
            tube([(0.65, 0.45, 0), (1.25, 0.5, 0), (0.95, 1.2, 0), (1.36, 1.25, 0)], 0.23, 0.1),
            blue,
            blend=0.08,
        ),
        Part(torus((1.36, 1.26, 0), (0.6, 0.8, 0), 0.08, 0.045), gold),
        Part(torus((-0.86, 0.82, 0), (0, 0, 1), 0.36, 0.085), gold),
    ]
    return Subject(parts, wall="#ff8a80", gloss=0.9, yaws=(12, -24, 30, -8, 152))


def vase() -> Subject:
    """Build a stoneware vase with a glaze that has run down from its rim."""
    clay, glaze, deep = "#b98a5e", "#2f6f6a", "#1d3f4a"
    body = lathe(
        [
            (0.42, 0.0),
            (0.66, 0.45),
            (0.74, 0.85),
            (0.55, 1.3),
            (0.3, 1.6),
            (0.3, 1.8),
            (0.42, 1.95),
        ],
        wall=0.08,
    )

    def run_down(p: Array) -> Array:
        turn = np.arctan2(p[0], p[2])
        edge = (
            1.05
            + 0.14 * np.sin(3 * turn + 0.6)
            + 0.08 * np.sin(7 * turn)
            + 0.05 * np.sin(13 * turn + 2)
        )
        return edge - p[1]

    parts = [
        Part(body, clay, texture=speckles(22, 0.55)),
        Part(run_down, glaze, paint=True, texture=speckles(30, 0.35)),
        Part(box((0, 1.62, 0), (2, 0.05, 2), 0), deep, paint=True),
        Part(torus((0, 1.95, 0), (0, 1, 0), 0.41, 0.05), deep),
        Part(
            torus((0.52, 1.45, 0), (0, 0, 1), 0.2, 0.055),
            glaze,
            blend=0.05,
            mirror=True,
            texture=speckles(30, 0.3),
        ),
    ]
    return Subject(parts, wall="#9aa3a0", gloss=0.55, yaws=(10, 60, -40, 115, -80), lens=True)


def sneaker() -> Subject:
    """Build a worn canvas shoe with a rubber sole, a toe cap and laces."""
    canvas, rubber, stripe, thread = "#2e6b4f", "#efe6d2", "#b23a2e", "#f4efe2"
    cloth = weave(42, 0.28)
    parts = [
        Part(ellipsoid((0, 0.32, 0.3), (0.38, 0.36, 0.86)), canvas, texture=cloth),
        Part(
            capsule((0, 0.45, -0.3), (0, 0.98, -0.4), 0.37, 0.33), canvas, blend=0.16, texture=cloth
        ),
        Part(ellipsoid((0, 1.34, -0.38), (0.24, 0.2, 0.27)), "#1b1c1a", paint=True),
        Part(capsule((0, 0.5, 0.65), (0, 1.25, -0.02), 0.14), "#3d8562", paint=True, texture=cloth),
        Part(
            ellipsoid((0, 0.22, 1.16), (0.42, 0.3, 0.36)),
            rubber,
            paint=True,
            texture=speckles(16, 0.15),
        ),
        Part(sphere((0.38, 0.74, -0.34), 0.15), thread, mirror=True, paint=True),
        Part(slab((0, 0.11, 0.24), (0.41, 0.11, 0.98)), rubber, texture=speckles(14, 0.22)),
        Part(box((0, 0.16, 0), (2, 0.022, 3), 0), stripe, paint=True),
        Part(capsule((0, 0.6, -0.76), (0, 1.2, -0.7), 0.06), rubber, blend=0.03),
    ]
    for y, z in ((0.67, 0.5), (0.72, 0.3), (0.82, 0.13), (0.98, 0.02)):
        parts.append(Part(capsule((-0.15, y, z), (0.15, y + 0.03, z - 0.01), 0.04), thread))
    return Subject(parts, wall="#b4a79a", gloss=0.08, yaws=(48, -62, 84, -35, 120), lens=True)


TOYS: dict[str, Callable[[], Subject]] = {
    make.__name__: make for make in (robot, dog, dog2, cat, backpack, teapot, vase, sneaker)
}


# ---- sceneries -----------------------------------------------------------------------------------
#
# A scenery returns the linear colour (3, n) of what each ray meets: of the floor at (x, ahead) as
# seen from the toy, and of what lies behind the floor in the direction (azimuth, elevation).

HORIZON = 100.0  # `ahead` is never more


def ramp(value: Array, start: float, end: float) -> Array:
    """Return 0 up to `start`, 1 from `end` on, and a straight line between them."""
    return np.clip((value - start) / (end - start), 0, 1)


def noise(x: Array, y: Array | float, seed: int) -> Array:
    """Return smooth noise in [0, 1]: one random value per unit, which repeats after 64 units."""
    lattice = np.random.default_rng(seed).random((64, 64), np.float32)
    i, j = np.floor(x).astype(int), np.floor(y).astype(int)
    u, v = ((f * f * (3 - 2 * f)).astype(np.float32) for f in (x - i, y - j))
    low, high = (
        lattice[i % 64, k % 64] * (1 - u) + lattice[(i + 1) % 64, k % 64] * u for k in (j, j + 1)
    )
    return low * (1 - v) + high * v


def sky(azimuth: Array, elevation: Array) -> Array:
    """Return a blue sky with clouds."""
    large, small = (
        noise(azimuth * 14 + 5, elevation * 34, 3),
        noise(azimuth * 40, elevation * 90, 4),
    )
    puffs = 0.7 * large + 0.3 * small
    blue = mix("#e4f5ff", "#4aa3ee", ramp(elevation, 0, 0.25))
    return mix(blue, "#ffffff", 0.9 * ramp(puffs, 0.55, 0.7))


def meadow(x: Array, ahead: Array, azimuth: Array, elevation: Array) -> Array:
    """Return a meadow with trees at its end."""
    blades = 0.6 * noise(x * 26, ahead * 8, 1) + 0.4 * noise(x * 4, ahead * 2, 2)
    fade = ramp(ahead, 1, 12)  # far blades have one colour
    grass = mix("#2f8a22", "#9bdc4c", ramp(blades, 0.15, 0.85) * (1 - fade) + 0.7 * fade)
    trees = 0.03 + 0.035 * noise(azimuth * 30, 0.0, 6)
    behind = np.where(elevation < trees, linear("#3c8f4a"), sky(azimuth, elevation))
    return np.where(ahead < HORIZON, grass, behind)


def beach(x: Array, ahead: Array, azimuth: Array, elevation: Array) -> Array:
    """Return a beach with the sea behind it."""
    grains = 0.5 * noise(x * 45, ahead * 30, 1) + 0.5 * noise(x * 3, ahead * 3, 2)
    sand = mix("#d9b473", "#f7e2ae", ramp(grains, 0.2, 0.8))
    waves = noise(x * 1.5, np.log(np.maximum(ahead, 0.1)) * 20, 5)
    water = mix("#35c2d0", "#1673b8", ramp(ahead, 3, 16))
    sea = mix(water, "#d8f6ff", 0.5 * ramp(waves, 0.68, 0.85))
    shore = ahead - 2.2 - 0.5 * noise(x * 1.2, 0.0, 7)
    ground = np.where(shore < 0, sand, np.where(shore < 0.35, linear("#ffffff"), sea))
    return np.where(ahead < HORIZON, ground, sky(azimuth, elevation))


def wood(x: Array, ahead: Array, azimuth: Array, elevation: Array) -> Array:
    """Return a floor of boards before a wall."""
    plank = np.floor(x / 0.7)
    fibres = noise(x * 18 + plank * 7, ahead * 1.2 + plank * 13, 1)
    grain = 0.55 * fibres + 0.45 * noise(plank * 5.5, 0.0, 2)
    seam = np.abs(x / 0.7 - plank - 0.5) > 0.475
    boards = mix(mix("#9a5a2c", "#d79a5b", grain), "#5c3317", seam)
    wall = mix("#ffffff", mix("#f2d9a8", "#f9ecd0", ramp(elevation, -0.1, 0.2)), ahead > 3)
    return np.where(ahead < 2.6, boards, wall)


def snow(x: Array, ahead: Array, azimuth: Array, elevation: Array) -> Array:
    """Return snow with fir trees at its end."""
    ground = mix("#dde8f8", "#ffffff", ramp(noise(x * 1.3, ahead * 1.1, 1), 0.2, 0.8))
    saw = azimuth * 11
    height = 0.08 + 0.08 * noise(np.floor(saw) * 0.77, 0.0, 3)
    trees = elevation < height * (1 - 1.6 * np.abs(saw % 1 - 0.5))
    behind = mix(mix("#f3f8ff", "#86b4ea", ramp(elevation, 0, 0.25)), "#4f8f86", trees)
    return np.where(ahead < HORIZON, ground, behind)


def studio(wall: str) -> Callable[..., Array]:
    """Make the scenery of a studio in one colour, its floor lighter."""
    floor = mix(wall, "#ffffff", 0.3)
    return lambda x, ahead, azimuth, elevation: mix(floor, wall, ramp(ahead, 0.5, 5))


def scenery(index: int, toy: Subject) -> tuple[Callable[..., Array], float]:
    """Return what photo number `index` shows behind the toy, and the camera's pitch in degrees."""
    return [(studio(toy.wall), 14.0), (meadow, 7.0), (beach, 8.0), (wood, 17.0), (snow, 6.0)][index]


# ---- photos --------------------------------------------------------------------------------------


def background(model: Model, scene: Callable[..., Array], eye: Array, direction: Array) -> Array:
    """Return the light (3, n) of the floor and of what is behind it, with the toy's shadow."""
    depth = np.where(direction[1] < 0, (-1 - eye[1]) / np.minimum(direction[1], -1e-6), np.inf)
    floor = eye + direction * np.minimum(depth, 2 * HORIZON)
    colour = scene(floor[0], np.minimum(-floor[2], HORIZON), direction[0], direction[1])
    near = np.flatnonzero(length(floor) < 3 * model.radius)
    p = floor[:, near]
    colour[:, near] *= 0.45 + 0.55 * sunlit(model, p)
    colour[:, near] *= 0.35 + 0.65 * openness(model, p, vec((0, 1, 0)))
    return colour


def render(toy: Subject, index: int, size: int) -> Image.Image:
    """Take photo number `index` of the toy, `size` pixels square."""
    scene, pitch = scenery(index, toy)
    turn, camera = rotation(toy.yaws[index]), tilted(pitch)
    eye = -CAMERA_DISTANCE * camera[2][:, None]

    # A coarse lattice says where the toy is, so that it fills the frame.
    solid = np.indices((72, 72, 72), np.float32).reshape(3, -1) / 71 * 4 - 2
    solid = solid[:, Model(toy.parts, turn, toy.gloss).distance(solid) < 0.02]
    model = Model(toy.parts, turn, toy.gloss, radius=float(length(solid).max()) + 0.05)
    centre, half = frame(solid, camera, eye, FILL)

    # The light of every ray, then its mean over a pixel.
    direction = rays(centre, half, camera, size)
    chunks = [
        trace(model, scene, eye, direction[:, i : i + CHUNK])
        for i in range(0, direction.shape[1], CHUNK)
    ]
    layers = np.clip(np.concatenate(chunks, axis=1), 0, 1)
    behind, toy_light, covered = layers[:3], layers[3:6], layers[6:]
    if toy.lens:
        behind = defocused(behind.reshape(3, size * SUPERSAMPLING, -1), 0.016).reshape(3, -1)
    light = behind + (toy_light - behind) * covered
    pixels = light.reshape(3, size, SUPERSAMPLING, size, SUPERSAMPLING).mean((2, 4))
    if toy.lens:
        pixels = photographed(pixels, np.random.default_rng(index))
    return Image.fromarray(develop(pixels))


def trace(model: Model, scene: Callable[..., Array], eye: Array, direction: Array) -> Array:
    """Return what arrives along the rays, (7, n).

    Rows 0 to 2 are the light from behind the toy, rows 3 to 5 that of the toy, and row 6 is 1 where
    a ray meets the toy.
    """
    depth = march(model, eye, direction)
    hit = np.isfinite(depth)
    layers = np.zeros((7, direction.shape[1]), np.float32)
    layers[:3] = background(model, scene, eye, direction)
    layers[3:6, hit] = shade(model, eye + direction[:, hit] * depth[hit], direction[:, hit])
    layers[6] = hit
    return layers


def defocused(light: Array, radius: float) -> Array:
    """Blur an image (3, h, w) by two box filters. `radius` is a share of its side."""
    reach = max(1, round(radius * light.shape[1]))
    for axis in (1, 2, 1, 2):
        # A mean over a window is a difference of two running sums.
        margins = [(reach, reach) if k == axis else (0, 0) for k in range(3)]
        total = np.cumsum(np.pad(light, margins, mode="edge"), axis)
        along = np.moveaxis(total, axis, 0)
        mean = (along[2 * reach :] - along[: -2 * reach]) / (2 * reach)
        light = np.moveaxis(mean, 0, axis)
    return light


def photographed(light: Array, rng: np.random.Generator) -> Array:
    """Give an image (3, h, w) a camera's tint, darker corners and grain."""
    size = light.shape[1]
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    corners = 1 - 0.28 * np.clip(np.hypot(axis[:, None], axis[None]) - 0.35, 0, None)
    tint = rng.uniform(0.93, 1.07, (3, 1, 1)) * rng.uniform(0.82, 1.05)
    grain = rng.normal(0, 0.012, light.shape)
    return np.clip(light * corners * tint + grain * np.sqrt(np.clip(light, 0.02, 1)), 0, 1)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--outdir", type=Path, default=Path("models/tiny/subjects"))
    parser.add_argument("--subjects", nargs="+", choices=TOYS, default=list(TOYS), metavar="NAME")
    parser.add_argument("--size", type=int, default=256, help="pixels per side")
    args = parser.parse_args(argv)
    for name in args.subjects:
        toy, folder = TOYS[name](), args.outdir / name
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(len(toy.yaws)):
            render(toy, index, args.size).save(
                folder / f"{index:02}.jpg", quality=93, subsampling=0
            )
        print(f"{folder}: {len(toy.yaws)} photos of {args.size} pixels")


if __name__ == "__main__":
    main()
