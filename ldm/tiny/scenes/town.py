"""Scenes in a town and indoors: streets, houses, floors, rugs and cloth."""

from __future__ import annotations

import numpy as np
from PIL import Image

from ldm.tiny.scenes.paint import VARIANTS, mix, rgb
from ldm.tiny.scenes.plate import Plate, scene
from ldm.tiny.scenes.tiles import folds


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
    cloth = folds(int(p.rng.integers(VARIANTS)))
    length = round(side * len(cloth))
    top, left = p.rng.integers(len(cloth) - length + 1, size=2)
    crop = Image.fromarray(cloth[top : top + length, left : left + length])
    light = np.asarray(crop.resize((p.n, p.n), Image.Resampling.BILINEAR))[..., None]
    pinks = ("#d9538f", "#ffb3d4"), ("#e06a9f", "#ffc6dd"), ("#cf4a86", "#ff9cc8")
    dark, bright = map(rgb, p.choice(*pinks))
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


@scene("with a blue house in the background")
def _house(p: Plate) -> None:
    horizon = p.between(0.6, 0.7)
    p.sky(horizon)
    p.hills(horizon, 0.14, "#4f9a4a")
    p.ground("grass", horizon)
    p.put(
        "blue house",
        p.choice(p.between(0.2, 0.34), p.between(0.66, 0.8)),
        horizon + 0.04,
        p.between(0.58, 0.68),
    )


@scene("with the Eiffel Tower in the background")
def _paris(p: Plate) -> None:
    horizon = p.between(0.66, 0.74)
    p.sky(horizon, clouds=2)
    for x in np.linspace(0, 1, 7):
        p.put("tree", x + p.between(-0.05, 0.05), horizon + 0.04, p.between(0.12, 0.2))
    side = p.choice(p.between(0.18, 0.26), p.between(0.74, 0.82))
    p.put("eiffel tower", side, horizon + 0.08, p.between(0.74, 0.8))
    p.ground("grass", horizon)
    p.polygon([(0.46, horizon + 0.02), (0.54, horizon + 0.02), (0.85, 1), (0.15, 1)], "#d9c9a5")


@scene("on top of a white rug")
def _on_white_rug(p: Plate) -> None:
    horizon = p.between(0.35, 0.48)
    p.ground("dark wood", horizon - 0.15, texels=240, tilt=0.9)
    wall = rgb(p.choice("#8fa6b5", "#b9a48f", "#7f9a8a", "#a08fa8", "#c7b7a3"))
    p.gradient(wall, wall * 0.9, end=horizon)
    p.gradient("#fbfaf6", "#d9d3c7", start=horizon - 0.03, end=horizon + 0.015)
    p.put("white rug", p.between(0.46, 0.54), p.between(0.98, 1.02), p.between(0.4, 0.46))


@scene("on top of a mirror")
def _on_mirror(p: Plate) -> None:
    horizon = p.between(0.3, 0.42)
    p.ground("dark wood", horizon - 0.15, texels=240, tilt=0.9)
    wall = rgb(p.choice("#e3c9b0", "#cfe0d8", "#e9d7e3", "#d9dcec", "#f0e2c0"))
    p.gradient(wall, wall * 0.92, end=horizon)
    p.gradient("#fbfaf6", "#d9d3c7", start=horizon - 0.03, end=horizon + 0.015)
    p.put("mirror", p.between(0.47, 0.53), p.between(1.0, 1.05), p.between(0.46, 0.52))


@scene("on top of the sidewalk in a crowded street")
def _crowded_street(p: Plate) -> None:
    horizon = p.between(0.4, 0.48)
    p.sky(0.3, clouds=0)
    for x in np.arange(p.between(-0.1, 0.1), 1.2, 0.26):
        p.put("facade", x, horizon, 0.5)
    p.ground("pavement", horizon, texels=160)
    for x in np.linspace(0.05, 0.95, 8):
        p.put(
            "person",
            x + p.between(-0.04, 0.04),
            horizon + p.between(0.08, 0.16),
            p.between(0.32, 0.4),
        )
    for x in (p.between(0.0, 0.14), p.between(0.86, 1.0)):
        p.put("person", x, horizon + p.between(0.24, 0.34), p.between(0.48, 0.56))
