"""Scenes out of doors: jungle, snow, beach, fields, water and the night."""

from __future__ import annotations

import numpy as np
from PIL import ImageDraw

from ldm.tiny.scenes.paint import scaled, shade
from ldm.tiny.scenes.plate import Plate, scene


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
    for x in (
        p.between(-0.05, 0.12),
        p.between(0.88, 1.05),
        p.between(-0.05, 0.2),
        p.between(0.8, 1.05),
    ):
        p.put(p.choice("leaf", "frond"), x, p.between(0.95, 1.1), p.between(0.35, 0.6))


@scene("in the snow")
def _in_the_snow(p: Plate) -> None:
    horizon = p.between(0.3, 0.5)
    p.gradient(
        *p.choice(("#b9cfe8", "#eef4fb"), ("#a3c4ea", "#e9f2fc"), ("#c9d3de", "#eef1f5")),
        end=horizon + 0.03,
    )
    for x in np.linspace(0, 1, 8):
        p.put("fir", x + p.between(-0.06, 0.06), horizon + 0.04, p.between(0.22, 0.48))
    p.ground("snow", horizon, texels=180)
    p.dots(16, (0.009, 0.016), "#ffffff")


@scene("on the beach")
def _beach(p: Plate) -> None:
    horizon, shore = p.between(0.25, 0.42), p.between(0.55, 0.68)
    p.sky(horizon)
    p.ground("water", horizon, texels=300)
    # The sand ends in a wavy line of foam.
    x = np.linspace(0, 1, 16)
    edge = shore + 0.02 * np.sin(6 * x + p.between(0, 6)) + p.between(-0.04, 0.04) * x
    p.patch([(0, 1), *zip(x, edge), (1, 1)], "sand", horizon - 0.1, texels=260)
    foam = scaled([*zip(x, edge)], p.n)
    ImageDraw.Draw(p.image).line(foam, fill="#ffffff", width=max(2, p.n // 36), joint="curve")
    if p.chance(0.35):
        p.put(
            "palm",
            p.choice(p.between(0.05, 0.15), p.between(0.85, 0.95)),
            shore + 0.12,
            p.between(0.55, 0.7),
        )


@scene("with a mountain in the background")
def _mountains(p: Plate) -> None:
    horizon = p.between(0.58, 0.68)
    p.sky(horizon, clouds=2)
    p.put("mountain", p.between(0.0, 1.0), horizon + 0.02, p.between(0.35, 0.45))
    p.put("mountain", p.between(0.25, 0.75), horizon + 0.02, p.between(0.5, 0.6))
    p.hills(horizon, 0.1, p.choice("#3f7d4a", "#4b8a4c", "#386f4a"))
    p.ground("grass", horizon)


@scene("on top of a purple rug in a forest")
def _purple_rug_in_forest(p: Plate) -> None:
    horizon = p.between(0.5, 0.58)
    p.gradient(
        *p.choice(("#bfe3a0", "#7fb56a"), ("#a9d6a0", "#5f9f62"), ("#d6e8a8", "#86b35f")),
        end=horizon + 0.02,
    )
    _trunks(p, horizon, 6, 0.03, "#7b8f5f")
    p.ground("forest floor", horizon)
    _trunks(p, horizon + 0.05, 5, 0.055, "#5d442e")
    for x in (0.05, 0.3, 0.6, 0.95):
        p.put("leaf", x + p.between(-0.1, 0.1), p.between(0.08, 0.16), p.between(0.2, 0.3))
    p.put("purple rug", p.between(0.46, 0.54), p.between(0.97, 1.0), p.between(0.32, 0.38))


def _trunks(p: Plate, foot: float, count: int, width: float, colour: str) -> None:
    """Draw trunks that reach out of the picture, their right side in shadow."""
    for middle in np.linspace(0.02, 0.98, count):
        x, half = middle + p.between(-0.07, 0.07), width * p.between(0.7, 1.2) / 2
        right = x + half
        for left, tone in ((x - half, 1.0), (x + 0.2 * half, 0.75)):
            p.polygon([(left, 0), (right, 0), (right, foot), (left, foot)], shade(colour, tone))


@scene("with a wheat field in the background")
def _wheat_field(p: Plate) -> None:
    horizon = p.between(0.3, 0.42)
    p.sky(horizon)
    p.hills(horizon, 0.06, "#7d9a52")
    p.ground("wheat", horizon, texels=320)
    for y in (0.62, 0.78, 1.0):
        for x in np.linspace(0, 1, 5):
            p.put(
                "wheat",
                x + p.between(-0.06, 0.06),
                y + p.between(0, 0.04),
                p.between(0.2, 0.27) * (0.6 + 0.5 * y),
            )


@scene("with a tree and autumn leaves in the background")
def _autumn(p: Plate) -> None:
    horizon = p.between(0.55, 0.65)
    p.gradient(
        *p.choice(("#cfe3f0", "#f7ead2"), ("#e8dcc8", "#f6e3c0"), ("#bcd7ee", "#f2efe0")),
        end=horizon + 0.02,
    )
    p.hills(horizon, 0.16, p.choice("#d88a3a", "#c9732e", "#d9a441"))
    p.ground("autumn leaves", horizon, texels=200)
    tree = p.choice(p.between(0.05, 0.25), p.between(0.75, 0.95))
    p.put("autumn tree", 1 - tree + p.between(-0.1, 0.1), horizon + 0.03, p.between(0.35, 0.5))
    p.put("autumn tree", tree, horizon + 0.1, p.between(0.8, 0.95))
    for _ in range(14):
        p.put("fallen leaf", p.between(0, 1), p.between(0.1, 1), p.between(0.06, 0.09))


@scene("floating on top of water")
def _on_water(p: Plate) -> None:
    # Seen along the water, or from above, where the horizon is out of the picture.
    horizon = p.between(0.1, 0.3) if p.chance(0.5) else -0.5
    if horizon > 0:
        p.sky(horizon, clouds=2)
    p.ground("water", horizon, texels=240)


@scene("floating in an ocean of milk")
def _on_milk(p: Plate) -> None:
    horizon = p.between(0.1, 0.3)
    p.gradient(
        *p.choice(("#f3b6c6", "#fbe6dc"), ("#f6c9a0", "#fdf0dc"), ("#c9b7e6", "#f6e8f0")),
        end=horizon + 0.02,
    )
    p.ground("milk", horizon, texels=240)


@scene("on top of green grass with sunflowers around it")
def _sunflowers(p: Plate) -> None:
    horizon = p.between(0.2, 0.35)
    p.sky(horizon, clouds=1)
    p.hills(horizon, 0.08, "#3f8a3f")
    p.ground("grass", horizon)
    for x in np.linspace(0.02, 0.98, 7):
        p.put(
            "sunflower",
            x + p.between(-0.05, 0.05),
            horizon + p.between(0.14, 0.2),
            p.between(0.28, 0.36),
        )
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
    # The road and its two ruts run to one point on the horizon.
    vanish = p.between(0.35, 0.65)
    road = [
        (vanish - 0.03, horizon),
        (vanish + 0.03, horizon),
        (1.0, 0.85),
        (1.1, 1),
        (-0.1, 1),
        (0.0, 0.85),
    ]
    p.patch(road, "dirt", horizon, texels=200)
    for foot, width in ((0.28, 0.05), (0.72, 0.05)):
        rut = [
            (0.75 * vanish + 0.25 * foot, 0.8 * horizon + 0.2),
            (foot - width, 1),
            (foot + width, 1),
        ]
        p.image.paste("#6b4626", (0, 0, p.n, p.n), p.mask(rut, opacity=70))


@scene("at night")
def _night(p: Plate) -> None:
    horizon = p.between(0.6, 0.7)
    p.gradient("#070b26", p.choice("#1d2a63", "#27245c", "#16305e"), end=horizon + 0.03)
    p.dots(18, (0.007, 0.012), "#fff8dc", 0, horizon - 0.1)
    p.put(
        "moon",
        p.choice(p.between(0.1, 0.25), p.between(0.75, 0.9)),
        p.between(0.2, 0.3),
        p.between(0.13, 0.18),
    )
    p.hills(horizon, 0.14, "#0d1738")
    p.gradient("#1d2c5c", "#111a3d", start=horizon)
    p.hills(1.0, 0.16, "#0f1838")


@scene("in a meadow")
def _meadow(p: Plate) -> None:
    horizon = p.between(0.28, 0.45)
    p.sky(horizon)
    p.hills(horizon, 0.14, p.choice("#3f9a4a", "#4fa857", "#358a45"))
    p.ground("grass", horizon)
