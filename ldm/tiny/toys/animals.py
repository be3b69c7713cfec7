"""Toy animals: how to build a head and several bodies, and what is special in each kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ldm.tiny.renderer import Head, Toy
from ldm.tiny.shapes import Part, Vec, capsule, ellipsoid, sphere, stripes, torus, tube

Random = np.random.Generator
JOINTS = 6  # of a bent tube: few, for speed
DARK, WHITE, PINK = "#1d1512", "#ffffff", "#ff8fa3"


@dataclass(frozen=True)
class Coat:
    """The colours of an animal: its fur, its lighter belly and muzzle, its ears or markings."""

    fur: str
    light: str
    mark: str


def pick(rng: Random, *options):
    """Choose one of the options."""
    return options[int(rng.integers(len(options)))]


def near(rng: Random, value: float, spread: float = 0.15) -> float:
    """Return a length, changed at random by up to the share `spread` of it."""
    return float(value * rng.uniform(1 - spread, 1 + spread))


# ---- heads: parts around a centre (0, y, z), `s` times the size of a head of radius 0.45 ---------


def floppy_ears(y: float, z: float, s: float, c: Coat) -> list[Part]:
    """Add the hanging ears of a dog."""
    ear = capsule(
        (0.42 * s, y + 0.16 * s, z - 0.04 * s), (0.54 * s, y - 0.24 * s, z), 0.1 * s, 0.17 * s
    )
    return [Part(ear, c.mark, blend=0.04, mirror=True)]


def pointed_ears(y: float, z: float, s: float, c: Coat) -> list[Part]:
    """Add the pointed ears of a cat or a fox."""
    ear = capsule(
        (0.27 * s, y + 0.24 * s, z - 0.04), (0.38 * s, y + 0.62 * s, z - 0.06), 0.17 * s, 0.03 * s
    )
    inner = ellipsoid((0.32 * s, y + 0.4 * s, z + 0.12 * s), (0.08 * s, 0.17 * s, 0.12 * s))
    return [Part(ear, c.mark, blend=0.04, mirror=True), Part(inner, PINK, mirror=True, paint=True)]


def long_ears(y: float, z: float, s: float, c: Coat) -> list[Part]:
    """Add the long ears of a rabbit."""
    ear = capsule(
        (0.16 * s, y + 0.3 * s, z - 0.05), (0.27 * s, y + 1.05 * s, z - 0.12), 0.1 * s, 0.12 * s
    )
    inner = capsule(
        (0.18 * s, y + 0.5 * s, z + 0.08 * s), (0.27 * s, y + 1.0 * s, z + 0.03), 0.07 * s
    )
    return [Part(ear, c.fur, blend=0.05, mirror=True), Part(inner, PINK, mirror=True, paint=True)]


def round_ears(y: float, z: float, s: float, c: Coat) -> list[Part]:
    """Add the round ears of a bear."""
    ear = ellipsoid((0.33 * s, y + 0.35 * s, z - 0.03), (0.17 * s, 0.17 * s, 0.09 * s))
    inner = ellipsoid((0.33 * s, y + 0.35 * s, z + 0.08 * s), (0.09 * s, 0.09 * s, 0.08 * s))
    return [
        Part(ear, c.mark, blend=0.03, mirror=True),
        Part(inner, c.light, mirror=True, paint=True),
    ]


def long_muzzle(y: float, z: float, s: float, c: Coat) -> list[Part]:
    """Add the snout of a dog or a fox, with its nose."""
    snout = capsule(
        (0, y - 0.1 * s, z + 0.25 * s), (0, y - 0.15 * s, z + 0.62 * s), 0.2 * s, 0.12 * s
    )
    nose = ellipsoid((0, y - 0.08 * s, z + 0.73 * s), (0.1 * s, 0.075 * s, 0.07 * s))
    return [Part(snout, c.light, blend=0.08), Part(nose, DARK)]


def round_muzzle(y: float, z: float, s: float, c: Coat) -> list[Part]:
    """Add the short muzzle of a dog or a bear, with its nose."""
    muzzle = ellipsoid((0, y - 0.14 * s, z + 0.36 * s), (0.23 * s, 0.18 * s, 0.2 * s))
    nose = ellipsoid((0, y - 0.06 * s, z + 0.54 * s), (0.11 * s, 0.08 * s, 0.06 * s))
    return [Part(muzzle, c.light, blend=0.06), Part(nose, DARK)]


def small_muzzle(y: float, z: float, s: float, c: Coat) -> list[Part]:
    """Add the cheeks and the small pink nose of a cat or a rabbit."""
    cheek = ellipsoid((0.11 * s, y - 0.16 * s, z + 0.34 * s), (0.15 * s, 0.12 * s, 0.13 * s))
    nose = ellipsoid((0, y - 0.07 * s, z + 0.44 * s), (0.065 * s, 0.05 * s, 0.06 * s))
    return [Part(cheek, c.light, blend=0.04, mirror=True), Part(nose, PINK)]


def eyes(y: float, z: float, s: float, white: bool, apart: float = 0.2) -> list[Part]:
    """Add a pair of eyes, dark ones or (`white`) dark on white."""
    x, front = apart * s, z + 0.37 * s
    dark = Part(sphere((x, y + 0.08 * s, front + 0.03 * s), 0.085 * s), DARK, mirror=True)
    glint = Part(
        sphere((x + 0.02 * s, y + 0.12 * s, front + 0.1 * s), 0.03 * s), WHITE, mirror=True
    )
    if not white:
        return [dark, glint]
    ball = Part(
        ellipsoid((x, y + 0.08 * s, front - 0.02 * s), (0.13 * s, 0.14 * s, 0.1 * s)),
        WHITE,
        mirror=True,
    )
    return [
        ball,
        Part(sphere((x - 0.01, y + 0.08 * s, front + 0.06 * s), 0.065 * s), DARK, mirror=True),
    ]


Feature = Callable[[float, float, float, Coat], list[Part]]


def head(
    rng: Random, y: float, z: float, s: float, c: Coat, ears: Feature, muzzle: Feature
) -> tuple[list[Part], Head]:
    """Build a head and say where it wears things."""
    skull = ellipsoid((0, y, z), (near(rng, 0.47, 0.08) * s, near(rng, 0.42, 0.06) * s, 0.41 * s))
    parts = [Part(skull, c.fur, blend=0.06)]
    parts += [*ears(y, z, s, c), *muzzle(y, z, s, c), *eyes(y, z, s, white=rng.random() < 0.35)]
    places = Head(
        centre=(0, y, z),
        radius=0.45 * s,
        top=y + 0.38 * s,
        eyes=(0, y + 0.08 * s, z + 0.42 * s),
        neck=(0, y - 0.42 * s, z + 0.1),
    )
    return parts, places


# ---- bodies --------------------------------------------------------------------------------------


def standing(
    rng: Random, c: Coat, ears: Feature, muzzle: Feature, tail: list[Vec], thick: float = 0.1
) -> Toy:
    """Build an animal on four legs."""
    leg, girth, back = near(rng, 0.48, 0.3), near(rng, 0.32), near(rng, 0.5, 0.25)
    paw = pick(rng, c.fur, c.light)
    y = leg + 0.75 * girth
    parts = [
        Part(capsule((0, y, -back), (0, y + 0.04, 0.3), girth), c.fur),
        Part(capsule((0, y + 0.1, 0.3), (0, y + 0.5, 0.5), 0.25), c.fur, blend=0.15),
    ]
    for z in (0.34, -back - 0.04):
        shank = capsule((0.2, leg + 0.1, z), (0.22, 0.12, z + 0.05), 0.135)
        parts.append(Part(shank, c.fur, blend=0.08, mirror=True))
        parts.append(
            Part(ellipsoid((0.22, 0.1, z + 0.1), (0.16, 0.1, 0.2)), paw, blend=0.04, mirror=True)
        )
    end = [(x, y + 0.1 + up, -back - 0.2 - out) for x, up, out in tail]
    parts.append(Part(tube(end, thick, 0.7 * thick, JOINTS), c.fur, blend=0.08))
    if rng.random() < 0.5:
        parts.append(Part(sphere((0, y + 0.3, -0.5 * back), near(rng, 0.4)), c.mark, paint=True))
    size = near(rng, 0.98, 0.12)
    face, places = head(rng, y + 0.78, 0.55, size, c, ears, muzzle)
    return Toy(parts + face + collar(rng, places), near(rng, 0.15, 0.5), places)


def sitting(
    rng: Random, c: Coat, ears: Feature, muzzle: Feature, tail: list[Vec], thick: float = 0.1
) -> Toy:
    """Build an animal that sits and looks ahead."""
    girth, tall = near(rng, 0.46), near(rng, 0.62)
    parts = [
        Part(ellipsoid((0, tall, -0.12), (girth, tall, 0.48)), c.fur),
        Part(ellipsoid((0, tall, 0.3), (0.55 * girth, 0.8 * tall, 0.25)), c.light, paint=True),
        Part(
            ellipsoid((0.8 * girth, 0.22, 0.05), (0.2, 0.22, 0.34)), c.fur, blend=0.06, mirror=True
        ),
        Part(
            capsule((0.15, tall, 0.26), (0.16, 0.14, 0.42), 0.115), c.fur, blend=0.04, mirror=True
        ),
        Part(ellipsoid((0.16, 0.1, 0.5), (0.14, 0.1, 0.17)), c.light, blend=0.04, mirror=True),
    ]
    end = [(x, 0.15 + up, -0.45 - out) for x, up, out in tail]
    parts.append(Part(tube(end, thick, 0.7 * thick, JOINTS), c.fur, blend=0.06))
    face, places = head(rng, 2 * tall + 0.22, 0.12, near(rng, 1.0, 0.12), c, ears, muzzle)
    return Toy(parts + face + collar(rng, places), near(rng, 0.15, 0.5), places)


def plush(rng: Random, c: Coat, ears: Feature, muzzle: Feature) -> Toy:
    """Build a stuffed animal that sits with its feet towards the viewer."""
    girth = near(rng, 0.5, 0.12)
    parts = [
        Part(ellipsoid((0, 0.55, 0), (girth, 0.55, 0.42)), c.fur),
        Part(ellipsoid((0, 0.55, 0.3), (0.6 * girth, 0.4, 0.25)), c.light, paint=True),
        Part(
            capsule((0.3, 0.2, 0.1), (0.42, 0.2, 0.55), 0.19, 0.21), c.fur, blend=0.05, mirror=True
        ),
        Part(ellipsoid((0.43, 0.2, 0.78), (0.14, 0.14, 0.06)), c.light, mirror=True, paint=True),
        Part(
            capsule((0.42, 0.82, 0.08), (0.66, 0.42, 0.3), 0.15, 0.17),
            c.fur,
            blend=0.05,
            mirror=True,
        ),
        Part(sphere((0, 0.25, -0.45), 0.14), c.light, blend=0.03),
    ]
    face, places = head(rng, 1.4, 0.05, near(rng, 1.05, 0.1), c, ears, muzzle)
    return Toy(parts + face + collar(rng, places), 0.05, places)


def upright(rng: Random, c: Coat, ears: Feature, muzzle: Feature) -> Toy:
    """Build a bear that stands on its hind legs."""
    girth = near(rng, 0.5, 0.12)
    parts = [
        Part(ellipsoid((0, 0.78, 0), (girth, 0.62, 0.44)), c.fur),
        Part(ellipsoid((0, 0.75, 0.32), (0.62 * girth, 0.45, 0.25)), c.light, paint=True),
        Part(capsule((0.24, 0.4, 0), (0.26, 0.14, 0.05), 0.2), c.mark, blend=0.05, mirror=True),
        Part(ellipsoid((0.26, 0.1, 0.16), (0.2, 0.1, 0.26)), c.mark, blend=0.04, mirror=True),
        Part(
            capsule((0.42, 1.12, 0), (0.68, 0.62, 0.18), 0.16, 0.15),
            c.mark,
            blend=0.05,
            mirror=True,
        ),
        Part(sphere((0, 0.5, -0.44), 0.13), c.fur, blend=0.03),
    ]
    face, places = head(rng, 1.62, 0.05, near(rng, 1.05, 0.1), c, ears, muzzle)
    return Toy(parts + face, near(rng, 0.12, 0.5), places)


def collar(rng: Random, places: Head) -> list[Part]:
    """Add a collar with a tag to every second animal."""
    if rng.random() < 0.6:
        return []
    colour = pick(rng, "#e0182d", "#1f6fe0", "#18a558", "#f2b705", "#8a2fc0")
    _, y, z = places.neck
    ring = torus((0, y, z - 0.08), (0, 1, 0.25), 0.27, 0.055)
    return [Part(ring, colour), Part(sphere((0, y - 0.1, z + 0.24), 0.07), "#ffc91f")]


# ---- kinds ---------------------------------------------------------------------------------------

CURL: list[Vec] = [(0, 0, 0), (0, 0.1, 0.4), (0, 0.6, 0.25)]
THIN: list[Vec] = [(0, 0, 0), (0, 0.05, 0.5), (0.1, 0.9, 0.35)]
BUSH: list[Vec] = [(0, 0, 0), (0, -0.05, 0.35), (0, 0.25, 0.7)]
STUB: list[Vec] = [(0, 0, 0), (0, 0.06, 0.05), (0, 0.1, 0.1)]
ASIDE: list[Vec] = [(0.1, 0, 0), (0.8, -0.05, 0), (0.7, 0.6, -0.1)]


def dog(rng: Random) -> Toy:
    """Build a dog."""
    coat = pick(
        rng,
        Coat("#c98a4b", "#f0d7ae", "#7d4a21"),
        Coat("#f3e6cf", "#ffffff", "#a8672c"),
        Coat("#3a3431", "#b98d5d", "#1e1a19"),
        Coat("#8a5a34", "#d9b58a", "#4e2e17"),
        Coat("#b9bcc4", "#f1f1f3", "#6d717c"),
        Coat("#e8b45e", "#fbe6bd", "#b9782a"),
        Coat("#ffffff", "#f4f4f4", "#2c2c2f"),
    )
    muzzle = pick(rng, long_muzzle, round_muzzle, round_muzzle)
    build = pick(rng, standing, standing, sitting)
    return build(rng, coat, floppy_ears, muzzle, CURL, near(rng, 0.09, 0.3))


def cat(rng: Random) -> Toy:
    """Build a cat, often a striped one."""
    coat = pick(
        rng,
        Coat("#f2a04a", "#ffe3bf", "#d97b22"),
        Coat("#3b3b42", "#f2f2f2", "#2b2b30"),
        Coat("#b7a488", "#efe6d6", "#7d6a50"),
        Coat("#f4ead9", "#ffffff", "#8b6a4e"),
        Coat("#ffffff", "#ffffff", "#e9e9ec"),
        Coat("#9b8fb0", "#e8e2f0", "#6f6388"),
    )
    build = pick(rng, standing, sitting, sitting)
    tail = THIN if build is standing else ASIDE
    toy = build(rng, coat, pointed_ears, small_muzzle, tail, 0.075)
    if rng.random() < 0.5:
        toy.parts.insert(len(toy.parts) // 3, Part(stripes(1, 0.26, 0.3), coat.mark, paint=True))
    return toy


def fox(rng: Random) -> Toy:
    """Build a fox: red, a white chin, a bushy tail."""
    fur = pick(rng, "#e8671b", "#d9551a", "#f07f2e", "#c9481a")
    coat = Coat(fur, "#fff6ea", pick(rng, fur, "#3a2118"))
    build = pick(rng, standing, sitting)
    tail = BUSH if build is standing else ASIDE
    toy = build(rng, coat, pointed_ears, long_muzzle, tail, 0.17)
    tip = (0.75, 0.75, -0.4) if build is sitting else (0, 1.15, -1.4)
    toy.parts.append(Part(sphere(tip, 0.3), "#fff6ea", paint=True))
    return toy


def rabbit(rng: Random) -> Toy:
    """Build a rabbit."""
    coat = pick(
        rng,
        Coat("#ffffff", "#ffffff", "#f0f0f2"),
        Coat("#b6a28c", "#f0e7da", "#8d7a66"),
        Coat("#9aa0aa", "#eceef1", "#757b86"),
        Coat("#d9b48a", "#f7ead8", "#b98c5e"),
    )
    toy = sitting(rng, coat, long_ears, small_muzzle, STUB, 0.2)
    return toy


def bear(rng: Random) -> Toy:
    """Build a bear, brown, black or white."""
    coat = pick(
        rng,
        Coat("#7b4a2a", "#d1a173", "#7b4a2a"),
        Coat("#5b3a24", "#b98a5e", "#5b3a24"),
        Coat("#2b2827", "#a3805c", "#2b2827"),
        Coat("#f4f4f0", "#ffffff", "#f4f4f0"),
        Coat("#a8713d", "#e2bd8c", "#a8713d"),
    )
    build = pick(rng, upright, upright, standing)
    muzzle = pick(rng, round_muzzle, long_muzzle)
    if build is standing:
        return standing(rng, coat, round_ears, muzzle, STUB, 0.13)
    return build(rng, coat, round_ears, muzzle)


def panda(rng: Random) -> Toy:
    """Build a panda: black limbs, ears and patches around the eyes."""
    black = pick(rng, "#1f1f23", "#2c2a2e", "#34303a")
    coat = Coat("#f7f6f2", "#ffffff", black)
    build = pick(rng, upright, plush)
    toy = build(rng, coat, round_ears, round_muzzle)
    middle = toy.head.eyes
    spot = ellipsoid((0.2, middle[1], middle[2]), (0.15, 0.17, 0.25))
    first_eye = next(
        n
        for n, part in enumerate(toy.parts)
        if part.mirror and part.colour in (DARK, WHITE) and n > 6
    )
    toy.parts.insert(first_eye, Part(spot, black, mirror=True, paint=True))
    if build is plush:
        for n in (2, 4):
            limb = toy.parts[n]
            toy.parts[n] = Part(limb.shape, black, limb.blend, limb.mirror)
    return toy


def stuffed_animal(rng: Random) -> Toy:
    """Build a stuffed animal: a bear, a rabbit or a dog of cloth, in any colour."""
    fur, light = pick(
        rng,
        ("#c78f58", "#f0d3a8"),
        ("#a86a3a", "#e9c79c"),
        ("#f1c6d3", "#fff0f4"),
        ("#b5cdea", "#eef5fc"),
        ("#d7c2a0", "#f8efdf"),
        ("#c9a7dd", "#f3e8fa"),
    )
    ears, muzzle = pick(
        rng, (round_ears, round_muzzle), (round_ears, round_muzzle), (long_ears, small_muzzle)
    )
    toy = plush(rng, Coat(fur, light, fur), ears, muzzle)
    if rng.random() < 0.5:
        assert toy.head is not None
        _, y, z = toy.head.neck
        bow = capsule((0.04, y - 0.02, z + 0.3), (0.2, y, z + 0.32), 0.05, 0.1)
        toy.parts.append(Part(bow, pick(rng, "#d8243c", "#2f6fd0", "#f2b705"), mirror=True))
    return toy


def penguin(rng: Random) -> Toy:
    """Build a penguin."""
    back, beak = (
        pick(rng, "#22242c", "#2c3550", "#3a3f4c", "#1f3f7a"),
        pick(rng, "#f59a1b", "#ffb52e", "#f2711c"),
    )
    girth, tall = near(rng, 0.52, 0.12), near(rng, 0.72, 0.1)
    y = 2 * tall + 0.12
    parts = [
        Part(ellipsoid((0, tall, 0), (girth, tall, 0.48)), back),
        Part(ellipsoid((0, y, 0.02), (0.42, 0.4, 0.39)), back, blend=0.15),
        Part(
            ellipsoid((0, tall - 0.05, 0.35), (0.72 * girth, 0.82 * tall, 0.3)),
            "#ffffff",
            paint=True,
        ),
        Part(
            ellipsoid((0.14, y - 0.03, 0.36), (0.19, 0.24, 0.2)), "#ffffff", mirror=True, paint=True
        ),
        Part(
            capsule((girth - 0.05, tall + 0.35, 0), (girth + 0.2, tall - 0.3, 0.05), 0.1, 0.08),
            back,
            mirror=True,
        ),
        Part(capsule((0, y - 0.08, 0.36), (0, y - 0.12, 0.58), 0.11, 0.03), beak),
        Part(ellipsoid((0.2, 0.06, 0.25), (0.19, 0.07, 0.28)), beak, mirror=True),
        Part(sphere((0.15, y + 0.06, 0.35), 0.07), DARK, mirror=True),
        Part(sphere((0.16, y + 0.09, 0.41), 0.025), WHITE, mirror=True),
    ]
    places = Head((0, y, 0), 0.42, y + 0.36, (0, y + 0.06, 0.38), (0, y - 0.38, 0.2))
    return Toy(parts, near(rng, 0.25, 0.5), places)


def owl(rng: Random) -> Toy:
    """Build an owl: large eyes in discs, tufts, wings at its sides."""
    fur, belly = pick(
        rng,
        ("#7a5230", "#e8cfa4"),
        ("#8d8f9a", "#f0f0f0"),
        ("#a8703a", "#f6e3c2"),
        ("#5a4a3f", "#d8c2a4"),
        ("#f2efe8", "#ffffff"),
        ("#6b4a78", "#e6d6ea"),
    )
    girth, tall = near(rng, 0.55, 0.1), near(rng, 0.72, 0.1)
    y, iris = 1.45 * tall, pick(rng, "#ffc93a", "#ff9d2e", "#f4e04d")
    parts = [
        Part(ellipsoid((0, tall, 0), (girth, tall, 0.48)), fur),
        Part(ellipsoid((0, 0.75 * tall, 0.35), (0.6 * girth, 0.6 * tall, 0.3)), belly, paint=True),
        Part(ellipsoid((0.22, y, 0.38), (0.24, 0.26, 0.22)), belly, mirror=True, paint=True),
        Part(
            capsule((0.3, y + 0.35, 0.1), (0.42, y + 0.68, 0.12), 0.12, 0.02),
            fur,
            blend=0.05,
            mirror=True,
        ),
        Part(ellipsoid((girth, 0.9 * tall, -0.02), (0.12, 0.55 * tall, 0.32)), fur, mirror=True),
        Part(ellipsoid((0.21, y, 0.36), (0.17, 0.17, 0.1)), iris, mirror=True),
        Part(sphere((0.2, y, 0.42), 0.085), DARK, mirror=True),
        Part(capsule((0, y - 0.08, 0.44), (0, y - 0.2, 0.5), 0.07, 0.02), "#f2a32e"),
        Part(ellipsoid((0.18, 0.05, 0.3), (0.15, 0.06, 0.18)), "#f2a32e", mirror=True),
    ]
    places = Head((0, y, 0), 0.5, 2 * tall - 0.06, (0, y, 0.42), (0, y - 0.38, 0.3))
    return Toy(parts, near(rng, 0.1, 0.5), places)
