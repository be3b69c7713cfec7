"""Ray march toys made of `Part`s: the light that a camera sees, and cut-outs for the tiny world.

A ray steps from the camera by the distance to the toy until it meets the surface. Light is linear,
one column of `(3, n)` for each ray, until `develop` makes it a picture. The camera looks at the
origin.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageColor

from ldm.tiny.shapes import Array, Part, Vec, length, melt, unit, vec

SUPERSAMPLING = 2  # rays per pixel and axis
CHUNK = 1 << 14  # rays at a time: few enough for the caches
CAMERA_DISTANCE = 6.0

SUN = unit(vec((-0.5, 0.85, 0.6)))
SUNLIGHT, SKYLIGHT, BOUNCE = vec((0.86, 0.81, 0.75)), vec((0.4, 0.43, 0.48)), vec((0.26, 0.23, 0.2))


@dataclass(frozen=True)
class Model:
    """A list of parts, turned by `turn` and moved so that the point (0, 1, 0) is the origin."""

    parts: Sequence[Part]
    turn: Array
    gloss: float = 0.2
    radius: float = 2.5  # of a sphere about the origin that holds it

    def layers(self, p: Array, paint: bool) -> Iterator[tuple[Part, Array, Array]]:
        """Yield every part, its share in the surface so far, and the distance to all so far.

        Parts that only colour others are left out unless `paint`.
        """
        p = self.turn.T @ p + vec((0, 1, 0))
        mirrored = np.concatenate([np.abs(p[:1]), p[1:]])
        total = np.full(p.shape[1], 1e3, np.float32)
        for part in self.parts:
            if part.paint and not paint:
                continue
            distance = part.shape(mirrored if part.mirror else p)
            if part.paint:
                share = distance < 0
            else:
                total, share = melt(total, distance, part.blend)
            yield part, share, total

    def distance(self, p: Array) -> Array:
        """Return the distance from every point to the toy."""
        *_, (_, _, total) = self.layers(p, paint=False)
        return total

    def colour(self, p: Array) -> Array:
        """Return the colour (3, n) of points on the surface."""
        colour = np.zeros_like(p)
        still = self.turn.T @ p + vec((0, 1, 0))
        for part, share, _ in self.layers(p, paint=True):
            own = linear(part.colour)
            if part.texture is not None:
                own = own * part.texture(still)
            colour += (own - colour) * share
        return colour


# ---- colours -------------------------------------------------------------------------------------


def linear(colour: str) -> Array:
    """Convert an sRGB colour like "#ff8800" to linear light (3, 1)."""
    srgb = np.array(ImageColor.getrgb(colour), np.float32)[:, None] / 255
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def mix(a: str | Array, b: str | Array, share: Array | float) -> Array:
    """Mix two colours or lights; `share` is that of `b`."""
    a = linear(a) if isinstance(a, str) else a
    b = linear(b) if isinstance(b, str) else b
    return a + (b - a) * share


def develop(light: Array) -> Array:
    """Convert light (3, ...) to sRGB bytes (..., 3)."""
    srgb = np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.moveaxis(np.round(srgb * 255).astype(np.uint8), 0, -1)


# ---- camera --------------------------------------------------------------------------------------


def rotation(yaw: float) -> Array:
    """Return the matrix (3, 3) of a turn about y by `yaw` degrees; positive is to the right."""
    cos, sin = np.cos(np.radians(yaw)), np.sin(np.radians(yaw))
    return np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]], np.float32)


def tilted(pitch: float) -> Array:
    """Return the camera's right, up and forward, looking down by `pitch` degrees."""
    cos, sin = np.cos(np.radians(pitch)), np.sin(np.radians(pitch))
    return np.array([[1, 0, 0], [0, cos, -sin], [0, -sin, -cos]], np.float32)


def frame(solid: Array, camera: Array, eye: Array, fill: float) -> tuple[Array, float]:
    """Return the centre of the points on the image plane, and half the side of their photo.

    The plane lies one unit before the eye; the points take the share `fill` of the photo's side.
    """
    right, up, depth = camera @ (solid - eye)
    bounds = np.array([[a.min(), a.max()] for a in (right / depth, up / depth)], np.float32)
    return bounds.mean(1), float(np.ptp(bounds, axis=1).max() / 2 / fill)


def rays(centre: Array, half: float, camera: Array, size: int) -> Array:
    """Return the directions (3, n) through a square of the image plane, row by row."""
    ticks = np.linspace(-half, half, 2 * size * SUPERSAMPLING + 1, dtype=np.float32)[1::2]
    across, up = np.meshgrid(centre[0] + ticks, centre[1] - ticks)
    return unit(camera.T @ np.stack([across.ravel(), up.ravel(), np.ones(across.size, np.float32)]))


# ---- light ---------------------------------------------------------------------------------------


def span(origin: Array, direction: Array, radius: float) -> tuple[Array, Array]:
    """Return how far along rays a sphere about the origin begins and ends.

    Where a ray misses the sphere, the end comes before the beginning.
    """
    middle = -(origin * direction).sum(0)
    half2 = radius**2 - (origin * origin).sum(0) + middle**2
    half = np.where(half2 > 0, np.sqrt(np.abs(half2)), -np.inf)
    return np.maximum(middle - half, 0), middle + half


def march(model: Model, eye: Array, direction: Array, steps: int = 80) -> Array:
    """Return how far along every ray (n,) the surface lies, infinity where there is none."""
    t, end = span(eye, direction, model.radius)
    found, active = np.full_like(t, np.inf), np.flatnonzero(t < end)
    for _ in range(steps):
        d = model.distance(eye + direction[:, active] * t[active])
        t[active] += 0.85 * d  # less than the distance, which some shapes estimate too large
        found[active[d < 1e-3]] = t[active[d < 1e-3]]
        active = active[(d >= 1e-3) & (t[active] < end[active])]
        if not len(active):
            break
    return found


def sunlit(model: Model, p: Array, steps: int = 28) -> Array:
    """Return the share of a soft sun that reaches each point, (n,) from 0 to 1."""
    t, end = span(p, SUN, model.radius * 1.1)
    t, lit, active = np.maximum(t, 0.03), np.ones_like(t), np.flatnonzero(t < end)
    for _ in range(steps):
        d = model.distance(p[:, active] + SUN * t[active])
        lit[active] = np.minimum(lit[active], np.clip(0.5 + 5 * d / t[active], 0, 1))
        t[active] += np.clip(d, 0.03, 0.3)
        active = active[(t[active] < end[active]) & (lit[active] > 0)]
        if not len(active):
            break
    return lit * lit * (3 - 2 * lit)


def openness(model: Model, p: Array, normal: Array) -> Array:
    """Return the share of the sky that each point sees, by the free space along its normal."""
    taps = ((0.05, 0.3), (0.12, 0.25), (0.25, 0.2), (0.45, 0.15))
    hidden = sum(w * (1 - model.distance(p + normal * h) / h) for h, w in taps)
    return np.clip(1 - hidden, 0.15, 1)


def shade(model: Model, p: Array, direction: Array) -> Array:
    """Return the light (3, n) that points on the surface send back along rays.

    The sun, the sky and the ground give the light; gloss adds the sun's image and a bright rim.
    """
    corners = np.array([[1, -1, -1], [-1, -1, 1], [-1, 1, -1], [1, 1, 1]], np.float32)[:, :, None]
    normal = unit(sum(c * model.distance(p + 2e-3 * c) for c in corners))
    sun = np.clip((normal * SUN).sum(0), 0, 1) * sunlit(model, p + 0.01 * normal)
    upward = 0.5 + 0.5 * normal[1]
    light = SUNLIGHT * sun + mix(BOUNCE, SKYLIGHT, upward) * openness(model, p, normal)
    highlight = sun * np.clip((normal * unit(SUN - direction)).sum(0), 0, 1) ** 60
    rim = 0.25 * upward * (1 - np.clip(-(normal * direction).sum(0), 0, 1)) ** 4
    return model.colour(p) * light + model.gloss * (highlight + rim)


# ---- cut-outs ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """Where a toy wears things: the middle of its head, its half width, and its eyes and neck."""

    centre: Vec
    radius: float
    top: float  # height of the crown
    eyes: Vec  # between the eyes, on the surface
    neck: Vec


@dataclass(frozen=True)
class Toy:
    """A toy: parts that stand on y = 0 and look towards +z."""

    parts: list[Part]
    gloss: float = 0.2
    head: Head | None = None
    _solid: list[Array] = field(default_factory=list)

    def solid(self, cells: int = 44) -> Array:
        """Return points (3, n) in and on the toy, from a coarse lattice. It is computed once."""
        if not self._solid:
            lattice = np.indices((cells,) * 3, np.float32).reshape(3, -1) / (cells - 1) * 4 - 2
            still = Model(self.parts, rotation(0), self.gloss)
            self._solid.append(lattice[:, still.distance(lattice) < 0.03])
        return self._solid[0]


def cut_out(
    toy: Toy, yaw: float, pitch: float, size: int
) -> tuple[Image.Image, dict[str, list[float]]]:
    """Render a toy on nothing, trimmed to what it shows.

    Returns:
        The RGBA image, and where its head is: "crown", "eyes" and "neck" as [x, y, half width], in
        fractions of the image's width and height. A toy without a head has none of these.
    """
    turn, camera = rotation(yaw), tilted(pitch)
    eye = -CAMERA_DISTANCE * camera[2][:, None]
    solid = turn @ toy.solid()
    model = Model(toy.parts, turn, toy.gloss, radius=float(length(solid).max()) + 0.1)
    centre, half = frame(solid, camera, eye, fill=0.92)
    direction = rays(centre, half, camera, size)

    # Light and coverage of every ray, then their means over a pixel.
    light, covered = np.zeros_like(direction), np.zeros(direction.shape[1], np.float32)
    for start in range(0, direction.shape[1], CHUNK):
        some = direction[:, start : start + CHUNK]
        depth = march(model, eye, some)
        hit = np.flatnonzero(np.isfinite(depth))
        covered[start + hit] = 1
        light[:, start + hit] = shade(model, eye + some[:, hit] * depth[hit], some[:, hit])
    pixels = (4, size, SUPERSAMPLING, size, SUPERSAMPLING)
    mean = np.concatenate([np.clip(light, 0, 1), covered[None]]).reshape(pixels).mean((2, 4))
    alpha = mean[3]
    colour = develop(np.clip(mean[:3] / np.maximum(alpha, 1e-3), 0, 1))
    image = Image.fromarray(np.dstack([colour, (alpha * 255).round().astype(np.uint8)]))
    box = image.getchannel("A").point(lambda a: 255 * (a > 12)).getbbox() or (0, 0, size, size)
    anchors = _anchors(toy.head, turn, camera, eye, centre, half, size, box) if toy.head else {}
    return image.crop(box), anchors


def _anchors(
    head: Head,
    turn: Array,
    camera: Array,
    eye: Array,
    centre: Array,
    half: float,
    size: int,
    box: tuple[int, int, int, int],
) -> dict[str, list[float]]:
    """Project the head's places to the trimmed image."""
    left, top, right, bottom = box
    trimmed_width, trimmed_height = right - left, bottom - top

    def project(point: Vec, radius: float) -> list[float]:
        across, up, depth = (camera @ (turn @ (vec(point) - vec((0, 1, 0))) - eye))[:, 0]
        x = (across / depth - centre[0]) / (2 * half) + 0.5
        y = 0.5 - (up / depth - centre[1]) / (2 * half)
        wide = radius / depth / (2 * half) * size / trimmed_width
        return [(x * size - left) / trimmed_width, (y * size - top) / trimmed_height, float(wide)]

    crown = (head.centre[0], head.top, head.centre[2])
    places = {
        "crown": (crown, head.radius),
        "eyes": (head.eyes, head.radius),
        "neck": (head.neck, head.radius),
    }
    found = {}
    for name, place in places.items():
        numbers = project(*place)
        found[name] = [round(float(number), 4) for number in numbers]
    return found
