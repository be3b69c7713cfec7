"""The plate that a scene is drawn on: a larger picture with sky, ground, hills and props."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ldm.tiny.scenes.paint import TILE, VARIANTS, Array, Paint, Points, mix, scaled, shade, to_hex
from ldm.tiny.scenes.props import prop
from ldm.tiny.scenes.tiles import MIP_START, REGULAR, mipmaps, perspective

Scene = Callable[[np.random.Generator, int], Array]

SCENES: dict[str, Scene] = {}
SUPERSAMPLING = 2  # a scene is drawn larger and averaged, so that its edges are smooth
SKIES = (
    ("#5ea9ec", "#d7edfb"),
    ("#4b97e4", "#bfe0f8"),
    ("#7fb9e8", "#f0f4f2"),
    ("#6f9fe0", "#f6dfc8"),
)


class Plate:
    """A scene that is being drawn. Places and heights are fractions of its side, y downwards."""

    def __init__(self, rng: np.random.Generator, size: int):
        self.rng, self.size, self.n = rng, size, size * SUPERSAMPLING
        self.image = Image.new("RGBA", (self.n, self.n))

    def between(self, low: float, high: float) -> float:
        """Choose a number between two."""
        return float(self.rng.uniform(low, high))

    def chance(self, p: float) -> bool:
        """Return True with probability `p`."""
        return bool(self.rng.random() < p)

    def choice(self, *options: object) -> Any:
        """Choose one of the options, all equally likely."""
        return options[self.rng.integers(len(options))]

    def gradient(self, top: Paint, bottom: Paint, *, start: float = 0.0, end: float = 1.0) -> None:
        """Fill the rows from `start` to `end` from the colour `top` to the colour `bottom`."""
        first, last = round(start * self.n), round(end * self.n)
        share = np.linspace(0, 1, max(1, last - first))[:, None]
        rows = mix(shade(top, 1), shade(bottom, 1), share)
        strip = Image.fromarray(np.clip(rows * 255, 0, 255).astype(np.uint8)[:, None])
        self.image.paste(strip.resize((self.n, strip.height)), (0, first))

    def sky(self, horizon: float, clouds: int = 3) -> None:
        """Draw a blue sky with some clouds, sometimes paler or that of an evening."""
        self.gradient(*self.choice(*SKIES), end=horizon + 0.02)
        for _ in range(self.rng.integers(clouds + 1)):
            y = self.between(0.1, max(0.12, horizon - 0.05))
            self.put("cloud", self.between(0, 1), y, self.between(0.08, 0.18))

    def ground(self, kind: str, horizon: float, texels: float = 240, tilt: float = 1.6) -> None:
        """Lay a tile out as the ground, from the horizon to the lower edge.

        Args:
            kind: name of the tile.
            horizon: negative where it is above the picture.
            texels: how many points of the tile the lower edge spans.
            tilt: a larger one stretches the tile less towards the viewer.
        """
        # Where each pixel of the ground lies on the tile. The horizon is rounded, so that the cache
        # has it.
        horizon_row = round(horizon * 32) * self.n // 32
        columns, rows, level, far = perspective(self.n, horizon_row, texels, tilt)

        # Move the tile at random. Most tiles are also moved row by row far away: their period would
        # show as rays that meet on the horizon.
        du, dv = self.rng.integers(TILE, size=2)
        if kind not in REGULAR:
            du = du + (far * self.rng.integers(TILE, size=far.shape)).astype(np.int32)

        # Read the pixels from the copy of the tile whose size fits the distance.
        row, column = ((rows + dv) & (TILE - 1)) >> level, ((columns + du) & (TILE - 1)) >> level
        start_of_row = (MIP_START[level] + row * (TILE >> level)).astype(np.int32)
        index = start_of_row + column.astype(np.int32)
        pixels = mipmaps(kind, int(self.rng.integers(VARIANTS))).take(index)
        strip = Image.frombuffer(
            "RGBA", (self.n, len(pixels)), pixels.view(np.uint8), "raw", "RGBA", 0, 1
        )
        self.image.paste(strip, (0, self.n - len(pixels)))

    def mask(self, outline: Points, opacity: int = 255) -> Image.Image:
        """Return a mask that is `opacity` inside the outline and 0 elsewhere."""
        mask = Image.new("L", (self.n, self.n))
        ImageDraw.Draw(mask).polygon(scaled(outline, self.n), fill=opacity)
        return mask

    def patch(self, outline: Points, kind: str, horizon: float, texels: float) -> None:
        """Lay another ground inside the outline."""
        around = self.image.copy()
        self.ground(kind, horizon, texels)
        self.image = Image.composite(self.image, around, self.mask(outline))

    def put(self, kind: str, x: float, y: float, height: float) -> None:
        """Put some variant of a prop with the middle of its lower edge at (x, y)."""
        pixels = max(2, round(height * 48) * self.n // 48)  # in steps, so that the cache has it
        image = prop(kind, int(self.rng.integers(VARIANTS)), pixels, self.chance(0.5))
        left, top = round(x * self.n - image.width / 2), round(y * self.n) - image.height
        self.image.paste(image, (left, top), image)

    def polygon(self, points: Points, colour: Paint) -> None:
        """Fill a polygon with one colour."""
        ImageDraw.Draw(self.image).polygon(scaled(points, self.n), fill=to_hex(colour))

    def hills(self, horizon: float, height: float, colour: Paint) -> None:
        """Draw a soft ridge on the horizon."""
        x = np.linspace(0, 1, 24)
        a, b, c = self.rng.uniform(0, 6.3, 3)
        waves = 0.3 * np.sin(5 * x + a) + 0.15 * np.sin(11 * x + b) + 0.05 * np.sin(23 * x + c)
        ridge = horizon - height * (0.55 + waves)
        foot = horizon + 0.03
        self.polygon([(0, foot), *zip(x.tolist(), ridge.tolist()), (1, foot)], colour)

    def dots(
        self,
        count: int,
        radius: tuple[float, float],
        colour: str,
        low: float = 0.0,
        high: float = 1.0,
    ) -> None:
        """Draw snowflakes or stars between the rows `low` and `high`."""
        draw = ImageDraw.Draw(self.image)
        least, most = (0, low, radius[0]), (1, high, radius[1])
        for x, y, r in self.rng.uniform(least, most, (count, 3)) * self.n:
            draw.ellipse([x - r, y - r, x + r, y + r], fill=colour)

    def finish(self) -> Array:
        """Return the picture at its size, its light slightly varied: (size, size, 3) uint8."""
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
