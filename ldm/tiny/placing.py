"""How a sprite comes onto a scene: where it stands, its shadow, the water around it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from ldm.tiny.accessories import Accessory
from ldm.tiny.sprites import BORDER, Change, Sprite

Array = np.ndarray
SUPERSAMPLING = 2  # a sprite is turned at twice its size, then reduced, for smooth edges


@dataclass(frozen=True)
class Place:
    """Where a sprite stands, in fractions of the picture's side.

    `x` is its middle, `bottom` its foot; `foot_x` and `foot_half` say where it touches the ground.
    """

    x: float
    bottom: float
    width: float
    height: float
    foot_x: float
    foot_half: float
    angle: float
    mirrored: bool

    @classmethod
    def random(
        cls,
        rng: np.random.Generator,
        sprite: Sprite,
        longest: float,
        mirrored: bool,
        bottom: tuple[float, float] = (0.84, 0.96),
    ) -> Place:
        """Choose a place at random.

        Args:
            longest: about the length of the sprite's longer side.
            bottom: the least and the greatest height of its foot, from the upper edge.
        """
        scale = longest / max(sprite.width, sprite.height)
        stretch = rng.uniform(0.95, 1.05)
        width, height = scale * sprite.width * stretch, scale * sprite.height / stretch
        room = max(0.0, 0.98 - width) / 2
        x = 0.5 + float(np.clip(rng.normal(0, 0.05), -room, room))
        foot = rng.uniform(*bottom)
        if height < 0.95:
            foot = max(height + 0.03, foot)  # a thing that fits into the picture is seen whole
        foot_x = x + (sprite.foot_centre - 0.5) * width * (-1 if mirrored else 1)
        foot_half = max(sprite.foot_half, 0.12) * width
        return cls(
            x, foot, width, height, foot_x, foot_half, math.radians(rng.normal(0, 3.0)), mirrored
        )

    def render(
        self, sprite: Sprite, size: int, finish: Change | None, roundness: float
    ) -> Float[Array, "h w 4"]:
        """Return the sprite on an empty picture, premultiplied, 0 to 255.

        `finish` may change its pixels; `roundness` from 0 to 1 is how strong its relief is.
        """
        n = size * SUPERSAMPLING
        # Take the smallest copy of the sprite that is large enough.
        wanted = 0.9 * self.height * n
        enough = [k for k, level in enumerate(sprite.levels) if level.height >= wanted]
        number = enough[-1] if enough else 0
        source, relief = sprite.level(number, finish), sprite.relief[number]
        box = (self.x, self.bottom - self.height / 2, self.width, self.height)
        layer = _turned(source, box, self.angle, self.mirrored, n)
        light = _turned(relief, box, self.angle, self.mirrored, n)
        layer[..., :3] *= 1 + roundness * (light[..., None] / 128 - 1)
        return layer

    def dress(
        self, sprite: Sprite, layer: Float[Array, "h w 4"], worn: Accessory
    ) -> Float[Array, "h w 4"]:
        """Return the layer with an accessory where the sprite wears it."""
        n = len(layer) * SUPERSAMPLING
        x, y, half = sprite.anchors[worn.anchor]
        # Anchors are fractions of the trimmed sprite, which has a border here.
        inner_width, inner_height = 1 - 2 * BORDER / sprite.width, 1 - 2 * BORDER / sprite.height
        across = (x - 0.5) * inner_width * self.width * (-1 if self.mirrored else 1)
        down = (y - 0.5) * inner_height * self.height
        wide = worn.width * 2 * half * inner_width * self.width
        high = wide * worn.image.height / worn.image.width
        down -= (worn.lift - 0.5) * high
        # It is turned together with the sprite, about the sprite's middle.
        c, s = math.cos(self.angle), math.sin(self.angle)
        middle_y = self.bottom - self.height / 2
        box = (self.x + c * across - s * down, middle_y + s * across + c * down, wide, high)
        worn_layer = _turned(worn.image.convert("RGBa"), box, self.angle, self.mirrored, n)
        return layer * (1 - worn_layer[..., 3:] / 255) + worn_layer


def _turned(
    image: Image.Image, box: tuple[float, float, float, float], angle: float, mirrored: bool, n: int
) -> Float[Array, "h w c"]:
    """Put an image on an empty picture of n x n pixels, then reduce that by `SUPERSAMPLING`.

    Args:
        box: x and y of the image's middle, its width and its height, in fractions of the picture.
    """
    x, y, width, height = box
    fx, fy = image.width / (width * n), image.height / (height * n)
    c, s, flip = math.cos(angle), math.sin(angle), -1 if mirrored else 1
    # PIL asks where in the image each pixel of the picture comes from: the inverse of the turn.
    a, b, d, e = flip * fx * c, flip * fx * s, -fy * s, fy * c
    inverse = (
        a,
        b,
        image.width / 2 - a * x * n - b * y * n,
        d,
        e,
        image.height / 2 - d * x * n - e * y * n,
    )
    drawn = image.transform((n, n), Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR)
    return np.array(drawn.reduce(SUPERSAMPLING), np.float32)


def compose(
    background: UInt8[Array, "h w 3"],
    layer: Float[Array, "h w 4"],
    place: Place,
    ground: str,
    rng: np.random.Generator,
) -> Float[Array, "h w 3"]:
    """Lay the sprite on the scene and return the picture, 0 to 255.

    A sprite throws a shadow, but on "water" it sinks a little. A "mirror" also reflects it.
    """
    axis = (np.arange(len(background), dtype=np.float32) + 0.5) / len(background)
    picture = background.astype(np.float32)
    if ground == "mirror":
        picture = _reflected(picture, layer, place)
    if ground == "water":
        layer = _sunk(layer, axis, place.bottom - 0.14 * place.height, rng)
        foam = _bump(axis, place.x, 0.6 * place.width, 4)
        foam = foam * _bump(axis, place.bottom - 0.13 * place.height + 0.015, 0.022, 2)[:, None]
        picture += (255 - picture) * (0.55 * foam)[..., None]
    else:
        picture *= 1 - _shadow(axis, place, rng)[..., None]
    side = rng.uniform(-0.1, 0.1) * (axis - 0.5)[None, :, None]  # a little more light on one side
    return picture * (1 - layer[..., 3:] / 255) + layer[..., :3] * (1 + side)


def _reflected(picture: Array, layer: Float[Array, "h w 4"], place: Place) -> Array:
    """Show the sprite faintly upside down below its foot."""
    size = len(picture)
    foot = min(round(place.bottom * size), size)
    below = np.zeros_like(layer)
    rows = min(size - foot, foot)
    below[foot : foot + rows] = layer[foot - rows : foot][::-1] * 0.5
    return picture * (1 - below[..., 3:] / 255) + below[..., :3]


def _shadow(axis: Array, place: Place, rng: np.random.Generator) -> Float[Array, "h w"]:
    """Return how much darker the scene is where the sprite stands and where its shadow falls."""
    contact = _bump(axis, place.foot_x, 1.1 * place.foot_half, 4)
    contact = contact * _bump(axis, place.bottom - 0.012, 0.03, 2)[:, None]
    reach = max(1.35 * place.foot_half, 0.3 * place.width)
    cast = _bump(axis, place.foot_x + rng.uniform(-0.3, 0.3) * place.foot_half, reach, 2)
    cast = cast * _bump(axis, place.bottom - 0.03, 0.075, 2)[:, None]
    return np.minimum(rng.uniform(0.3, 0.5) * contact + rng.uniform(0.25, 0.4) * cast, 0.7)


def _bump(axis: Array, centre: float, width: float, power: int) -> Array:
    """Return a bell curve with the value 1 at its centre; a larger power makes its top flat."""
    return np.exp(-(np.abs((axis - centre) / width) ** power))


def _sunk(
    layer: Float[Array, "h w 4"], axis: Array, level: float, rng: np.random.Generator
) -> Float[Array, "h w 4"]:
    """Let what is below the wavy water line show through faintly."""
    waves = level + 0.012 * np.sin(22 * axis + rng.uniform(0, 6.3))
    depth = (axis[:, None] - waves[None]) * len(axis)
    return layer * (1 - 0.75 * np.clip(depth + 0.5, 0, 1))[..., None]
