"""Toy things: vessels, clothes, vehicles and the robot.

Every function varies colours and proportions at random.
"""

from __future__ import annotations

import numpy as np

from ldm.tiny.renderer import Head, Toy
from ldm.tiny.shapes import (
    Part,
    Shape,
    Vec,
    box,
    capsule,
    dots,
    ellipsoid,
    lathe,
    slab,
    sphere,
    star,
    stripes,
    torus,
    tube,
)
from ldm.tiny.toys.animals import DARK, JOINTS, WHITE, near, pick

Random = np.random.Generator
BRIGHT = (
    "#e0392f",
    "#f28c1d",
    "#f6c927",
    "#38a84a",
    "#2c8fd6",
    "#3a57c9",
    "#8a45c0",
    "#ee6fa5",
    "#f4f1ea",
    "#12a5a0",
)
METAL = "#b8bec8"


def two_colours(rng: Random) -> tuple[str, str]:
    """Choose two different bright colours."""
    first, second = rng.choice(len(BRIGHT), 2, replace=False)
    return BRIGHT[first], BRIGHT[second]


def decorate(rng: Random, parts: list[Part], middle: float, colour: str) -> None:
    """Add painted rings, dots or nothing to a vessel whose middle is at height `middle`."""
    pattern = pick(rng, "rings", "dots", "band", "none")
    if pattern == "rings":
        parts.append(Part(stripes(1, near(rng, 0.35), 0.35), colour, paint=True))
    if pattern == "dots":
        parts.append(
            Part(dots((0, middle, 0), int(rng.integers(7, 11)), 0.45, 0.15), colour, paint=True)
        )
    if pattern == "band":
        parts.append(Part(box((0, middle, 0), (3, near(rng, 0.15), 3), 0), colour, paint=True))


# ---- vessels -------------------------------------------------------------------------------------


def teapot(rng: Random) -> Toy:
    """Build a teapot: a round or tall body, a spout on one side, a handle on the other, a lid."""
    body, accent = two_colours(rng)
    wide, tall = near(rng, 0.78, 0.15), near(rng, 0.74, 0.2)
    shapes = (
        ellipsoid((0, tall + 0.05, 0), (wide, tall, wide)),
        lathe(
            [
                (0.9 * wide, 0.05),
                (wide, 0.5 * tall),
                (0.8 * wide, 1.5 * tall),
                (0.5 * wide, 2 * tall),
            ],
            rounding=0.05,
        ),
    )
    parts = [Part(pick(rng, *shapes), body)]
    decorate(rng, parts, tall, accent)
    knob = pick(rng, body, accent)
    top, reach = 2 * tall, wide + 0.45
    spout: list[Vec] = [
        (0.7 * wide, 0.6 * tall, 0),
        (reach - 0.1, 0.7 * tall, 0),
        (wide + 0.1, 1.7 * tall, 0),
        (reach, 1.9 * tall, 0),
    ]
    handle = pick(
        rng,
        torus((-wide, 1.1 * tall, 0), (0, 0, 1), near(rng, 0.36), 0.08),
        tube(
            [
                (-0.6 * wide, 1.75 * tall, 0),
                (-wide - 0.7, 1.9 * tall, 0),
                (-wide - 0.5, 0.5 * tall, 0),
                (-0.8 * wide, 0.5 * tall, 0),
            ],
            0.085,
        ),
    )
    parts += [
        Part(ellipsoid((0, top - 0.04, 0), (0.5 * wide, 0.17, 0.5 * wide)), knob),
        Part(sphere((0, top + 0.2, 0), 0.12), accent, blend=0.05),
        Part(tube(spout, 0.22, 0.09, JOINTS), body, blend=0.08),
        Part(handle, pick(rng, body, accent)),
        Part(torus((0, 0.07, 0), (0, 1, 0), 0.5 * wide, 0.08), accent),
    ]
    return Toy(parts, near(rng, 0.5, 0.7))


def vase(rng: Random) -> Toy:
    """Build a vase of one of several outlines, some with handles."""
    body, accent = two_colours(rng)
    outlines = (
        [(0.35, 0.05), (0.62, 0.6), (0.66, 1.0), (0.3, 1.6), (0.28, 1.8), (0.42, 1.95)],
        [(0.4, 0.05), (0.5, 0.5), (0.72, 1.2), (0.66, 1.5), (0.34, 1.75), (0.4, 1.95)],
        [(0.3, 0.05), (0.36, 0.6), (0.42, 1.2), (0.56, 1.95)],
        [(0.5, 0.05), (0.7, 0.45), (0.62, 0.85), (0.22, 1.2), (0.2, 1.8), (0.3, 1.95)],
    )
    wide = near(rng, 1.0, 0.15)
    outline = [(wide * r, h) for r, h in pick(rng, *outlines)]
    parts = [Part(lathe(outline, wall=0.07), body)]
    decorate(rng, parts, 0.9, accent)
    parts.append(Part(torus((0, 1.96, 0), (0, 1, 0), outline[-1][0], 0.05), accent))
    if rng.random() < 0.35:
        ear = tube(
            [(0.5, 1.0, 0), (1.05, 1.1, 0), (0.9, 1.75, 0), (0.3, 1.65, 0)], 0.07, joints=JOINTS
        )
        parts.append(Part(ear, accent, mirror=True))
    if rng.random() < 0.3:
        for x, lean in ((0.0, 0.1), (0.25, 0.5), (-0.25, -0.5)):
            parts.append(
                Part(
                    tube([(0, 1.6, 0), (0.3 * lean, 2.1, 0), (x, 2.4, 0)], 0.03, joints=JOINTS),
                    "#3f9a3c",
                )
            )
            parts.append(
                Part(sphere((x, 2.42, 0), 0.15), pick(rng, "#f2557f", "#f6c927", "#e0392f"))
            )
    return Toy(parts, near(rng, 0.4, 0.7))


def bowl(rng: Random) -> Toy:
    """Build a bowl, empty or with fruit."""
    body, accent = two_colours(rng)
    wide, tall = near(rng, 1.0, 0.1), near(rng, 0.75, 0.2)
    outline = [
        (0.42 * wide, 0.1),
        (0.8 * wide, 0.4 * tall),
        (0.95 * wide, 0.75 * tall),
        (wide, tall),
    ]
    parts = [
        Part(lathe([(0.45 * wide, 0.0), (0.4 * wide, 0.14)]), accent),
        Part(lathe(outline, wall=0.08), body),
    ]
    decorate(rng, parts, 0.6 * tall, accent)
    if rng.random() < 0.5:
        fruit = pick(rng, "#e0392f", "#f6c927", "#f28c1d", "#7ab83a", "#6a3fa0")
        for x, y, z in (
            (0.35, 0, 0.2),
            (-0.3, 0, 0.3),
            (0, 0.04, -0.35),
            (0.0, 0.22, 0.05),
            (-0.45, 0, -0.2),
        ):
            parts.append(Part(sphere((x * wide, 0.9 * tall + y, z * wide), 0.3), fruit))
    return Toy(parts, near(rng, 0.35, 0.7))


def can(rng: Random) -> Toy:
    """Build a can: metal rims and a label."""
    label, accent = two_colours(rng)
    wide, tall = near(rng, 0.55, 0.15), near(rng, 1.75, 0.15)
    side = [(wide, 0.04), (wide, tall)]
    if rng.random() < 0.5:  # a drink: narrower at both ends
        side = [(0.8 * wide, 0.04), (wide, 0.18), (wide, tall - 0.2), (0.75 * wide, tall)]
    band = Part(box((0, 0.5 * tall, 0), (2, 0.36 * tall, 2), 0), label, paint=True)
    parts = [Part(lathe(side), METAL), band]
    motif = pick(rng, "star", "disc", "stripe", "leaf")
    if motif == "star":
        parts.append(Part(star(0, 0.5 * tall, 0.36), accent, paint=True))
    if motif == "disc":
        parts.append(Part(ellipsoid((0, 0.5 * tall, wide), (0.34, 0.36, 0.4)), accent, paint=True))
    if motif == "stripe":
        parts.append(Part(box((0, 0.5 * tall, 0), (2, 0.12, 2), 0), accent, paint=True))
    if motif == "leaf":
        parts.append(
            Part(
                capsule((-0.25, 0.35 * tall, wide), (0.25, 0.65 * tall, wide), 0.16),
                accent,
                paint=True,
            )
        )
    rim = side[-1][0]
    parts += [
        Part(torus((0, y, 0), (0, 1, 0), r, 0.04), METAL)
        for y, r in ((0.05, side[0][0]), (tall, rim))
    ]
    parts.append(Part(ellipsoid((0.1, tall + 0.04, 0.1), (0.16, 0.03, 0.1)), "#8d949f"))
    return Toy(parts, near(rng, 0.6, 0.4))


def candle(rng: Random) -> Toy:
    """Build a burning candle, on a saucer or in a holder."""
    wax, stand = two_colours(rng)
    wax = pick(rng, wax, "#fbf3df", "#f7e3b0")
    wide, tall = near(rng, 0.3, 0.3), near(rng, 1.1, 0.25)
    parts = [Part(lathe([(wide, 0.1), (wide, 0.1 + tall)], rounding=0.03), wax)]
    if rng.random() < 0.3:
        parts.append(Part(stripes(1, 0.4, 0.4), stand, paint=True))
    base = pick(rng, "saucer", "holder", "none")
    if base != "none":
        parts.append(Part(lathe([(0.7, 0.0), (0.75, 0.1)]), stand))
    if base == "holder":
        parts.append(Part(lathe([(wide + 0.1, 0.1), (wide + 0.12, 0.4)]), stand))
        parts.append(Part(torus((-0.85, 0.2, 0), (0, 0, 1), 0.18, 0.05), stand))
    top = 0.1 + tall
    parts += [
        Part(capsule((0.1, top, wide), (0.1, top - 0.35, wide + 0.02), 0.06), wax, blend=0.03),
        Part(capsule((0, top, 0), (0, top + 0.15, 0), 0.025), DARK),
        Part(capsule((0, top + 0.22, 0), (0, top + 0.55, 0), 0.13, 0.01), "#ffb01f"),
        Part(ellipsoid((0, top + 0.24, 0.1), (0.07, 0.12, 0.1)), "#fff3a0", paint=True),
    ]
    return Toy(parts, 0.2)


# ---- clothes -------------------------------------------------------------------------------------


def boot(rng: Random) -> Toy:
    """Build a boot: a shaft, a foot, a sole, perhaps laces or fur."""
    leather = pick(
        rng, "#8a4f2a", "#5a3a24", "#2e2c30", "#b9783a", "#c0392b", "#3f6fb0", "#d9b23a", "#3c8a50"
    )
    sole, tall = pick(rng, "#2b2420", "#e8dcc4", "#5a4030"), near(rng, 1.4, 0.25)
    parts = [
        Part(lathe([(0.36, 0.25), (0.36, 0.7), (near(rng, 0.42), tall)], wall=0.06), leather),
        Part(capsule((0, 0.36, 0.1), (0, 0.3, 0.7), 0.33, 0.28), leather, blend=0.2),
        Part(slab((0, 0.08, 0.33), (0.36, 0.09, 0.74)), sole),
        Part(box((0, 0.12, -0.2), (0.33, 0.12, 0.18), 0.05), sole),
    ]
    trim = pick(rng, "laces", "cuff", "strap")
    if trim == "laces":
        for y, z in ((0.62, 0.5), (0.8, 0.4), (0.98, 0.37)):
            parts.append(Part(capsule((-0.2, y, z), (0.2, y + 0.04, z), 0.045), "#f2d98a"))
    if trim == "cuff":
        parts.append(
            Part(torus((0, tall, 0), (0, 1, 0), 0.42, 0.12), pick(rng, "#f6f1e6", "#d9c2a0"))
        )
    if trim == "strap":
        parts.append(Part(torus((0, 0.62, 0.02), (0, 1, 0), 0.37, 0.05), "#d9b23a"))
    return Toy(parts, near(rng, 0.25, 0.7))


def sneaker(rng: Random) -> Toy:
    """Build a low shoe with a white sole, a toe cap, a stripe and laces."""
    body, accent = two_colours(rng)
    long = near(rng, 0.85, 0.1)
    parts = [
        Part(ellipsoid((0, 0.3, 0.3), (0.38, 0.36, long)), body),
        Part(capsule((0, 0.45, -0.3), (0, 0.74, -0.34), 0.36, 0.3), body, blend=0.15),
        Part(box((0, -0.1, 0.2), (1, 0.2, 2), 0), WHITE, paint=True),
        Part(ellipsoid((0, 1.06, -0.3), (0.22, 0.2, 0.26)), DARK, paint=True),
        Part(
            ellipsoid((0, 0.2, 0.35 + long), (0.4, 0.3, 0.35)), pick(rng, WHITE, accent), paint=True
        ),
        Part(capsule((0.4, 0.25, -0.1), (0.36, 0.55, 0.35), 0.07), accent, mirror=True, paint=True),
        Part(slab((0, 0.1, 0.25), (0.4, 0.1, long + 0.12)), WHITE),
        Part(ellipsoid((0, 0.72, -0.62), (0.12, 0.14, 0.06)), accent),
    ]
    for y, z in ((0.62, 0.1), (0.59, 0.28), (0.54, 0.46)):
        parts.append(Part(capsule((-0.17, y, z), (0.17, y, z), 0.04), WHITE))
    return Toy(parts, near(rng, 0.25, 0.7))


def glasses(rng: Random) -> Toy:
    """Build glasses: two rims with lenses, a bridge, and arms that reach back."""
    rim = pick(
        rng, "#22222a", "#8a4f2a", "#d0342c", "#e86fa8", "#2f6fd0", "#e8b92e", "#f2f0ea", "#38a84a"
    )
    lens = pick(rng, "#2a2f3a", "#3f3a55", "#bfe3f7", "#9fd0f2", "#c58fe0", "#f2c14e", "#6a4a34")
    x, wide, tall = 0.5, near(rng, 0.4, 0.1), near(rng, 0.32, 0.25)
    rounded = rng.random() < 0.5
    y = 0.9
    parts = []
    if rounded:
        parts.append(Part(torus((x, y, 0), (0, 0, 1), wide, 0.07), rim, mirror=True))
        parts.append(Part(ellipsoid((x, y, 0), (wide, wide, 0.04)), lens, mirror=True))
    else:
        parts.append(Part(box((x, y, 0), (wide + 0.06, tall + 0.06, 0.05), 0.04), rim, mirror=True))
        parts.append(
            Part(box((x, y, 0.03), (wide - 0.03, tall - 0.03, 0.05), 0.03), lens, mirror=True)
        )
    parts.append(Part(capsule((-0.12, y + 0.08, 0), (0.12, y + 0.08, 0), 0.06), rim))
    parts.append(
        Part(
            capsule((x + wide, y + 0.1, 0), (x + wide + 0.03, y + 0.08, -1.1), 0.055),
            rim,
            mirror=True,
        )
    )
    return Toy(parts, near(rng, 0.5, 0.5))


def backpack(rng: Random) -> Toy:
    """Build a backpack: a pocket in front, a loop on top, straps behind."""
    body, accent = two_colours(rng)
    wide, tall = near(rng, 0.64, 0.12), near(rng, 0.86, 0.1)
    strap = [(0.34, 1.6, -0.25), (0.36, 1.5, -0.85), (0.42, 0.4, -0.95), (0.4, 0.36, -0.2)]
    pocket = near(rng, 0.36, 0.2)
    parts = [
        Part(box((0, tall, 0), (wide, tall, 0.36), near(rng, 0.26, 0.2)), body),
        Part(box((0, 0.5, 0.36), (0.75 * wide, pocket, 0.16), 0.13), accent),
        Part(capsule((-0.4, 0.5 + 0.7 * pocket, 0.5), (0.4, 0.5 + 0.7 * pocket, 0.5), 0.03), DARK),
        Part(torus((0, 2 * tall, -0.08), (0, 0, 1), 0.17, 0.055), DARK),
        Part(tube(strap, 0.1, joints=JOINTS), pick(rng, accent, DARK), mirror=True),
    ]
    extra = pick(rng, "flap", "sides", "band", "badge")
    if extra == "flap":
        parts.append(Part(box((0, 1.75 * tall, 0.14), (wide + 0.03, 0.3, 0.3), 0.2), accent))
        parts.append(
            Part(box((0.3, 1.4 * tall, 0.42), (0.06, 0.25, 0.05), 0.03), "#d9b23a", mirror=True)
        )
    if extra == "sides":
        parts.append(Part(box((wide, 0.42, 0), (0.14, 0.32, 0.24), 0.12), accent, mirror=True))
    if extra == "band":
        parts.append(Part(box((0, 1.35 * tall, 0), (2, 0.09, 2), 0), accent, paint=True))
    if extra == "badge":
        parts.append(Part(star(0, 1.45 * tall, 0.22), WHITE, paint=True))
    return Toy(parts, near(rng, 0.15, 0.5))


# ---- vehicles and machines -----------------------------------------------------------------------


def wheels(x: float, places: tuple[float, ...], radius: float) -> list[Part]:
    """Add a pair of wheels at every z."""
    tyres = [
        Part(capsule((x, radius, z), (x + 0.1, radius, z), radius), "#26262b", mirror=True)
        for z in places
    ]
    hubs = [
        Part(sphere((x + 0.32, radius, z), 0.55 * radius), METAL, mirror=True, paint=True)
        for z in places
    ]
    return tyres + hubs


def cut_wheel(x: float, z: float, radius: float) -> Shape:
    """Return a disc that stands on the ground, its axis along x."""

    def distance(p: np.ndarray) -> np.ndarray:
        around = np.hypot(p[1] - radius, p[2] - z) - radius
        return np.maximum(around, np.abs(p[0] - x) - 0.11)

    return distance


def disc_wheels(x: float, places: tuple[float, ...], radius: float) -> list[Part]:
    """Add a pair of flat wheels with hubs at every z."""
    parts = []
    for z in places:
        parts.append(Part(cut_wheel(x, z, radius), "#26262b", mirror=True))
        parts.append(
            Part(sphere((x + 0.16, radius, z), 0.5 * radius), METAL, mirror=True, paint=True)
        )
    return parts


def car(rng: Random) -> Toy:
    """Build a car: a low body, a cabin with windows, lamps."""
    body = pick(rng, *BRIGHT, "#2c2c32", "#9aa0a8")
    long, cabin, tall = near(rng, 1.15, 0.08), near(rng, 0.55, 0.2), near(rng, 0.32, 0.2)
    back = pick(rng, -0.3, -0.15, 0.0)
    top = 0.82 + tall
    roof = box((0, 0.82 + 0.5 * tall, back), (0.46, 0.5 * tall + 0.1, cabin), 0.14)
    parts = [
        Part(box((0, 0.55, 0), (0.56, 0.3, long), 0.18), body),
        Part(roof, "#a9d8f2"),
        Part(box((0, top + 0.1, back), (1, 0.14, 1), 0), body, paint=True),
        Part(box((0.5, 0.8, back), (0.2, 0.6, 0.05), 0), body, mirror=True, paint=True),
        Part(box((0, 0.42, 0), (0.58, 0.07, long + 0.04), 0.05), "#4a4d55"),
        Part(sphere((0.36, 0.6, long), 0.11), "#fff3b8", mirror=True),
        Part(sphere((0.4, 0.6, -long), 0.09), "#e0392f", mirror=True),
        *disc_wheels(0.52, (0.68, -0.68), near(rng, 0.3, 0.1)),
    ]
    if rng.random() < 0.25:
        parts.append(Part(box((0, 1, 0), (0.14, 3, 3), 0), pick(rng, WHITE, DARK), paint=True))
    return Toy(parts, near(rng, 0.5, 0.5))


def bus(rng: Random) -> Toy:
    """Build a bus: a long box with a row of windows."""
    body, accent = two_colours(rng)
    long, tall = near(rng, 1.45, 0.08), near(rng, 0.68, 0.1)
    middle = 0.32 + tall
    glass = "#a9d8f2"
    parts = [
        Part(box((0, middle, 0), (0.55, tall, long), 0.12), body),
        Part(box((0, middle - 0.35 * tall, 0), (2, 0.09, 3), 0), accent, paint=True),
        Part(
            box((0.55, middle + 0.35 * tall, 0), (0.2, 0.3 * tall, long - 0.15), 0),
            glass,
            mirror=True,
            paint=True,
        ),
        Part(box((0, middle + 0.25 * tall, long), (0.42, 0.42 * tall, 0.2), 0), glass, paint=True),
        Part(box((0, middle + 0.35 * tall, -long), (0.4, 0.3 * tall, 0.2), 0), glass, paint=True),
    ]
    for z in np.linspace(-long + 0.45, long - 0.55, 5):
        post = box((0.55, middle + 0.35 * tall, float(z)), (0.2, 0.35 * tall, 0.05), 0)
        parts.append(Part(post, body, mirror=True, paint=True))
    parts += [
        Part(sphere((0.38, 0.5, long), 0.1), "#fff3b8", mirror=True),
        Part(sphere((0.4, 0.5, -long), 0.09), "#e0392f", mirror=True),
        *disc_wheels(0.5, (0.85, -0.85), 0.3),
    ]
    if rng.random() < 0.4:
        parts.append(Part(box((0, 2 * tall + 0.36, 0), (0.4, 0.08, 0.8 * long), 0.06), accent))
    return Toy(parts, near(rng, 0.4, 0.5))


def clock(rng: Random) -> Toy:
    """Build a clock: an alarm clock with bells and feet, or one in a wooden case."""
    case, accent = two_colours(rng)
    face, y = pick(rng, "#fdfbf4", "#fff6dc", "#e9f3fb"), 0.95
    hour, minute = rng.uniform(0, 2 * np.pi, 2)
    kind = pick(rng, "alarm", "alarm", "case", "round")
    z = 0.26
    parts = [Part(capsule((0, y, -0.1), (0, y, 0.05), 0.02), case)]
    if kind == "case":
        wood = pick(rng, "#7d4a24", "#5a3420", "#a8672c", case)
        parts.append(Part(box((0, y, 0), (0.8, 0.82, 0.2), 0.15), wood))
        parts.append(Part(box((0, 0.12, 0), (0.95, 0.12, 0.28), 0.05), wood))
    else:
        parts.append(Part(flat_disc(y, 0.78, 0.22), case))
    parts.append(Part(flat_disc(y, 0.62, z), face))
    for k in range(12):
        angle = np.pi * k / 6
        tick = sphere(
            (0.51 * np.sin(angle), y + 0.51 * np.cos(angle), z), 0.055 if k % 3 == 0 else 0.035
        )
        parts.append(Part(tick, DARK))
    for angle, reach, thick in ((hour, 0.3, 0.05), (minute, 0.44, 0.036)):
        tip = (reach * float(np.sin(angle)), y + reach * float(np.cos(angle)), z + 0.03)
        parts.append(Part(capsule((0, y, z + 0.03), tip, thick), DARK))
    if kind == "alarm":
        parts.append(Part(ellipsoid((0.45, y + 0.82, 0), (0.27, 0.2, 0.22)), accent, mirror=True))
        parts.append(Part(capsule((0.5, 0.35, 0), (0.62, 0.08, 0.05), 0.09), accent, mirror=True))
        parts.append(Part(torus((0, y + 0.95, 0), (0, 0, 1), 0.15, 0.05), METAL))
    return Toy(parts, near(rng, 0.35, 0.5))


def flat_disc(y: float, radius: float, half: float) -> Shape:
    """Return an upright disc that faces the viewer."""

    def distance(p: np.ndarray) -> np.ndarray:
        return np.maximum(np.hypot(p[0], p[1] - y) - radius, np.abs(p[2]) - half) - 0.02

    return distance


def robot(rng: Random) -> Toy:
    """Build a robot: a box of a head with lamps for eyes, a body, arms and legs or wheels."""
    body, accent = two_colours(rng)
    body = pick(rng, body, "#aab2bf", "#8d97a6", "#c9ced6")
    lamp = pick(rng, "#38e0ff", "#ffd23c", "#ff5a4a", "#7dff6a")
    wide, head_wide = near(rng, 0.45, 0.15), near(rng, 0.45, 0.15)
    y = 1.75
    parts = [
        Part(box((0, 0.95, 0), (wide, 0.4, 0.32), near(rng, 0.12, 0.5)), body),
        Part(capsule((0, 1.3, 0), (0, 1.5, 0), 0.12), METAL),
        Part(
            box((0, y, 0), (head_wide, 0.34, 0.34), near(rng, 0.12, 0.5)), pick(rng, body, accent)
        ),
        Part(box((0, y + 0.02, 0.31), (0.82 * head_wide, 0.22, 0.06), 0.05), "#1b2230"),
        Part(sphere((0.18, y + 0.05, 0.34), near(rng, 0.1)), lamp, mirror=True),
        Part(capsule((-0.14, y - 0.12, 0.37), (0.14, y - 0.12, 0.37), 0.025), lamp),
        Part(capsule((wide + 0.08, 1.15, 0), (wide + 0.24, 0.78, 0.12), 0.09), METAL, mirror=True),
        Part(sphere((wide + 0.26, 0.7, 0.14), 0.14), accent, mirror=True),
        Part(box((0, 0.98, 0.32), (0.24, 0.18, 0.04), 0.03), accent),
        Part(sphere((0.1, 1.0, 0.37), 0.05), lamp, mirror=True),
    ]
    if rng.random() < 0.65:
        parts.append(Part(capsule((0.2, 0.55, 0), (0.2, 0.2, 0), 0.12), METAL, mirror=True))
        parts.append(Part(box((0.23, 0.12, 0.07), (0.19, 0.12, 0.27), 0.09), accent, mirror=True))
    else:
        parts += disc_wheels(0.34, (0.0,), 0.34)
        parts.append(Part(box((0, 0.45, 0), (0.3, 0.15, 0.25), 0.05), METAL))
    crown = pick(rng, "antenna", "ears", "two")
    if crown == "antenna":
        parts.append(Part(capsule((0, 2.05, 0), (0, 2.35, 0), 0.035), METAL))
        parts.append(Part(sphere((0, 2.4, 0), 0.1), lamp))
    if crown == "ears":
        parts.append(
            Part(capsule((head_wide, y, 0), (head_wide + 0.12, y, 0), 0.14), accent, mirror=True)
        )
    if crown == "two":
        parts.append(Part(capsule((0.2, 2.05, 0), (0.36, 2.35, 0), 0.03), METAL, mirror=True))
        parts.append(Part(sphere((0.37, 2.38, 0), 0.08), lamp, mirror=True))
    places = Head((0, y, 0), head_wide, y + 0.33, (0, y + 0.05, 0.38), (0, 1.38, 0.15))
    return Toy(parts, near(rng, 0.5, 0.4), places)


# ---- others --------------------------------------------------------------------------------------


def cactus(rng: Random) -> Toy:
    """Build a cactus with ribs and arms, in a pot or not."""
    green = pick(rng, "#3f9a4a", "#2f7f45", "#6aa84f", "#4fa86a")
    pot, flower = (
        pick(rng, "#c8693a", "#d9a15a", *BRIGHT),
        pick(rng, "#f2557f", "#f6c927", "#ffffff"),
    )
    floor, tall = pick(rng, 0.0, 0.55, 0.55), near(rng, 1.35, 0.15)
    top = floor + tall
    parts = [Part(capsule((0, floor + 0.2, 0), (0, top, 0), near(rng, 0.3)), green)]
    for side in (1, -1):
        if rng.random() < 0.8:
            y = floor + float(rng.uniform(0.45, 0.75)) * tall
            arm = tube(
                [(0, y - 0.15, 0), (0.75 * side, y - 0.25, 0), (0.7 * side, y + 0.55, 0)],
                0.16,
                joints=JOINTS,
            )
            parts.append(Part(arm, green, blend=0.05))
    if rng.random() < 0.6:
        parts.append(Part(ribs(7), "#2c6b38", paint=True))
    else:
        parts.append(Part(stripes(1, 0.2, 0.2), "#cfe8a8", paint=True))
    if rng.random() < 0.6:
        parts.append(Part(ellipsoid((0, top + 0.32, 0), (0.2, 0.12, 0.2)), flower))
    if floor:
        parts.append(Part(lathe([(0.42, 0.0), (0.55, floor)]), pot))
        parts.append(Part(torus((0, floor, 0), (0, 1, 0), 0.55, 0.07), pot))
    return Toy(parts, 0.1)


def ribs(count: int) -> Shape:
    """Return a shape that covers lines up a round body."""

    def distance(p: np.ndarray) -> np.ndarray:
        turn = np.arctan2(p[0], p[2]) * count / (2 * np.pi)
        return np.abs(turn - np.round(turn)) - 0.12

    return distance


def toy(rng: Random) -> Toy:
    """Build a toy of another kind: a duck, a spinning top, a rocket, a monster or blocks."""
    return pick(rng, duck, duck, top, rocket, monster, monster, blocks)(rng)


def duck(rng: Random) -> Toy:
    """Build a rubber duck."""
    body = pick(rng, "#ffd22e", "#ffd22e", "#f7b52e", "#8fd3f2", "#f28fb5")
    parts = [
        Part(ellipsoid((0, 0.5, 0), (0.6, 0.5, 0.78)), body),
        Part(capsule((0, 0.6, -0.6), (0, 0.95, -0.95), 0.25, 0.08), body, blend=0.2),
        Part(sphere((0, 1.25, 0.35), near(rng, 0.44, 0.1)), body, blend=0.12),
        Part(ellipsoid((0, 1.15, 0.85), (0.25, 0.09, 0.25)), "#f2711c"),
        Part(sphere((0.19, 1.36, 0.7), 0.09), DARK, mirror=True),
        Part(ellipsoid((0.55, 0.62, -0.1), (0.14, 0.26, 0.4)), body, blend=0.05, mirror=True),
    ]
    return Toy(parts, 0.5, Head((0, 1.25, 0.35), 0.42, 1.64, (0, 1.38, 0.75), (0, 0.9, 0.5)))


def top(rng: Random) -> Toy:
    """Build a spinning top."""
    body, accent = two_colours(rng)
    cone = lathe([(0.04, 0.0), (0.3, 0.35), (0.85, 0.8), (0.85, 0.95), (0.2, 1.25)])
    bands = Part(stripes(1, 0.4, 0.5, offset=0.1), accent, paint=True)
    return Toy(
        [Part(cone, body), bands, Part(capsule((0, 1.2, 0), (0, 1.75, 0), 0.09), accent)], 0.5
    )


def rocket(rng: Random) -> Toy:
    """Build a toy rocket."""
    body, accent = two_colours(rng)
    hull = lathe([(0.3, 0.3), (0.45, 0.8), (0.42, 1.4), (0.2, 1.95), (0.03, 2.2)])
    parts = [
        Part(hull, body),
        Part(box((0, 2.1, 0), (1, 0.45, 1), 0), accent, paint=True),
        Part(ellipsoid((0, 1.2, 0.45), (0.2, 0.2, 0.2)), "#a9d8f2", paint=True),
    ]
    for x, z in ((0.5, 0.0), (-0.5, 0.0), (0.0, 0.5), (0.0, -0.5)):
        parts.append(Part(capsule((x, 0.6, z), (1.5 * x, 0.12, 1.5 * z), 0.1), accent))
    return Toy(parts, 0.4)


def monster(rng: Random) -> Toy:
    """Build a friendly monster with one eye or two, horns and a wide mouth."""
    body, accent = two_colours(rng)
    wide, y = near(rng, 0.6, 0.15), near(rng, 0.85, 0.1)
    parts = [
        Part(ellipsoid((0, y, 0), (wide, y, 0.5)), body),
        Part(ellipsoid((0, 0.6 * y, 0.4), (0.6 * wide, 0.4, 0.25)), accent, paint=True),
        Part(capsule((0.3, 1.8 * y, 0), (0.48, 2.25 * y, 0), 0.12, 0.02), accent, mirror=True),
        Part(
            capsule((wide, y, 0), (wide + 0.3, 0.6 * y, 0.15), 0.12), body, blend=0.05, mirror=True
        ),
        Part(ellipsoid((0.26, 0.08, 0.2), (0.2, 0.09, 0.28)), accent, mirror=True),
    ]
    if rng.random() < 0.5:
        parts.append(Part(sphere((0, 1.45 * y, 0.36), 0.25), WHITE))
        parts.append(Part(sphere((0, 1.45 * y, 0.53), 0.12), DARK))
    else:
        parts.append(Part(sphere((0.22, 1.45 * y, 0.36), 0.17), WHITE, mirror=True))
        parts.append(Part(sphere((0.21, 1.45 * y, 0.48), 0.08), DARK, mirror=True))
    mouth = ellipsoid((0, 1.05 * y, 0.5), (0.3, 0.08, 0.12))
    parts.append(Part(mouth, DARK, paint=True))
    return Toy(
        parts,
        0.3,
        Head((0, 1.5 * y, 0), 0.5 * wide + 0.1, 1.95 * y, (0, 1.45 * y, 0.5), (0, 0.95 * y, 0.4)),
    )


def blocks(rng: Random) -> Toy:
    """Build a tower of three blocks."""
    parts = []
    for k, colour in enumerate(rng.choice(BRIGHT, 3, replace=False)):
        half = 0.5 - 0.08 * k
        middle = (float(rng.uniform(-0.06, 0.06)), 0.5 + 0.85 * k, 0.0)
        parts.append(Part(box(middle, (half, 0.42, half), 0.06), str(colour)))
    parts.append(Part(star(0, 0.5, 0.3), WHITE, paint=True))
    return Toy(parts, 0.3)
