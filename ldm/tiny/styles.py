"""Styles: what a finished picture becomes when it is drawn, painted or set in glass.

`STYLES` maps the name that a caption uses to a function `(picture, outline, rng) -> picture`.
Pictures are `(size, size, 3)` float32 from 0 to 1. `outline` `(size, size)` is 1 where the thing is
and 0 elsewhere: it keeps the thing's contour where a style is coarse.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Array = np.ndarray
Random = np.random.Generator
Style = Callable[[Array, Array, Random], Array]

STYLES: dict[str, Style] = {}
# Other names that people use for a style.
ALIASES = {
    "pencil sketch": ("pencil sketch", "pencil drawing"),
    "watercolor painting": ("watercolor painting", "watercolour painting", "watercolor"),
    "ink wash painting": ("ink wash painting", "chinese ink painting"),
    "pixel art": ("pixel art",),
    "stained glass window": ("stained glass window",),
    "woodblock print": ("woodblock print", "japanese woodblock print"),
    "oil painting": ("oil painting", "van gogh painting"),
    "comic book drawing": ("comic book drawing", "comic book"),
}
PAPER = np.array([0.98, 0.96, 0.91], np.float32)
INK = np.array([0.10, 0.11, 0.14], np.float32)


def style(name: str) -> Callable[[Style], Style]:
    """Register a function as the style of this name."""

    def register(apply: Style) -> Style:
        STYLES[name] = apply
        return apply

    return register


# ---- tools ---------------------------------------------------------------------------------------


def luma(picture: Array) -> Array:
    """Return the brightness (size, size) of a picture."""
    return picture @ np.array([0.3, 0.59, 0.11], np.float32)


def blur(values: Array, radius: float) -> Array:
    """Blur a picture or a single channel. `radius` is in 64ths of its side."""
    pixels = Image.fromarray((np.clip(values, 0, 1) * 255).astype(np.uint8))
    scaled = radius * len(values) / 64
    return np.asarray(pixels.filter(ImageFilter.GaussianBlur(scaled)), np.float32) / 255


def median(picture: Array, size: int = 5) -> Array:
    """Remove small detail and keep edges."""
    pixels = Image.fromarray((np.clip(picture, 0, 1) * 255).astype(np.uint8))
    return np.asarray(pixels.filter(ImageFilter.MedianFilter(size)), np.float32) / 255


def edges(picture: Array, gain: float = 4.0) -> Array:
    """Return how strongly a picture changes at every pixel, (size, size) from 0 to 1."""
    soft = blur(picture, 0.7)
    change = np.zeros(soft.shape[:2], np.float32)
    for channel in np.moveaxis(soft, -1, 0):
        down, right = np.gradient(channel)
        change = np.maximum(change, np.hypot(down, right))
    return np.clip(gain * change * len(picture) / 64 - 0.12, 0, 1)


def saturate(picture: Array, factor: float) -> Array:
    """Make colours stronger (factor > 1) or weaker."""
    grey = luma(picture)[..., None]
    return np.clip(grey + (picture - grey) * factor, 0, 1)


def over(below: Array, above: Array, share: Array) -> Array:
    """Lay one picture or colour over another; `share` (size, size) is how much of it covers."""
    return below + (above - below) * share[..., None]


@functools.lru_cache(maxsize=32)
def cloud(seed: int, size: int, slope: float = 1.8) -> Array:
    """Return smooth noise (size, size) from 0 to 1."""
    fy, fx = np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size), indexing="ij")
    frequency = np.hypot(fx, fy)
    frequency[0, 0] = np.inf
    white = np.fft.fft2(np.random.default_rng(seed).standard_normal((size, size)))
    field = np.fft.ifft2(white * frequency**-slope).real
    return ((field - field.min()) / np.ptp(field)).astype(np.float32)


def any_cloud(rng: Random, size: int) -> Array:
    """Choose one of eight clouds and shift it at random."""
    field = cloud(int(rng.integers(8)), size)
    return np.roll(field, tuple(rng.integers(size, size=2)), (0, 1))


# ---- styles --------------------------------------------------------------------------------------


@style("pencil sketch")
def pencil_sketch(picture: Array, outline: Array, rng: Random) -> Array:
    """Draw grey lines on paper and hatch what is dark."""
    size = len(picture)
    grey = luma(picture)
    # Divided by its blurred negative, a picture leaves its lines alone.
    dodged = np.clip(grey / np.maximum(1 - blur(1 - grey, 2.5), 0.05), 0, 1) ** 1.5
    lines = np.maximum(np.clip(1 - dodged, 0, 1), edges(picture, 5.0))
    y, x = np.mgrid[:size, :size] * (64 / size)
    slope = rng.uniform(0.7, 1.3)
    strokes = 0.5 + 0.5 * np.sin(2 * np.pi * (x + slope * y) / 5.0 + 2.0 * any_cloud(rng, size))
    dark = np.clip(1.1 - 1.45 * blur(grey, 1.0), 0, 1)
    hatching = 0.5 * dark * (0.35 + 0.65 * strokes) * (0.55 + 0.45 * blur(outline, 0.7))
    graphite = np.clip(0.9 * lines + hatching + 0.08 * (1 - grey), 0, 0.92)
    lead = np.array([0.17, 0.17, 0.19], np.float32)
    return over(np.broadcast_to(PAPER, picture.shape), lead, graphite)


@style("watercolor painting")
def watercolor(picture: Array, outline: Array, rng: Random) -> Array:
    """Paint flat pale washes, darker at their edges, which end before the paper does."""
    size = len(picture)
    wash = saturate(median(picture, 5), 1.35)
    pools = np.clip(2.2 * edges(wash, 2.0), 0, 0.5)
    grain = any_cloud(rng, size)
    strength = np.clip(0.78 + 0.35 * (grain - 0.5) + 0.5 * pools, 0.3, 1)
    painted = over(np.broadcast_to(PAPER * 1.02, wash.shape), wash, strength)
    painted = painted * (1 - 0.35 * pools[..., None])
    # The paper stays white along a ragged border, except around the thing.
    axis = np.minimum(np.arange(size), np.arange(size)[::-1]) / size
    border = np.minimum(axis[:, None], axis[None])
    reach = np.clip((border - 0.05 - 0.16 * (grain - 0.35)) * 22, 0, 1)
    reach = np.maximum(reach, blur(outline, 1.0))
    return over(np.broadcast_to(np.minimum(PAPER * 1.02, 1), wash.shape), painted, reach)


@style("ink wash painting")
def ink_wash(picture: Array, outline: Array, rng: Random) -> Array:
    """Brush a few greys and black contours on rice paper, and stamp it with a red seal."""
    size = len(picture)
    grey = blur(luma(median(picture, 5)), 0.8)
    inside = blur(outline, 0.8)
    # The background fades to the paper; the thing keeps its darks.
    level = np.clip(np.round((grey + 0.12 * (any_cloud(rng, size) - 0.5)) * 4) / 4, 0, 1)
    ink = (1 - blur(level, 0.7)) * (0.38 + 0.58 * inside)
    contour = blur(np.clip(1.6 * edges(picture, 3.0), 0, 1), 0.5) * (0.35 + 0.6 * inside)
    paper = np.array([0.93, 0.90, 0.81], np.float32)
    cover = np.clip(np.maximum(ink, contour), 0, 0.95)
    painted = over(np.broadcast_to(paper, picture.shape), INK, cover)
    # The seal is a red square near a corner, with a mark of paper in it.
    seal = max(3, round(size * 0.13))
    left = round(size * (0.05 if rng.random() < 0.5 else 0.82))
    top = round(size * (0.06 if rng.random() < 0.5 else 0.8))
    painted[top : top + seal, left : left + seal] = np.array([0.78, 0.13, 0.10], np.float32)
    rows = slice(top + seal // 3, top + seal - seal // 3)
    columns = slice(left + seal // 4, left + seal - seal // 4)
    painted[rows, columns] = paper
    return painted


@style("pixel art")
def pixel_art(picture: Array, outline: Array, rng: Random) -> Array:
    """Draw 16 x 16 large pixels in few colours, with a dark contour."""
    blocks, cover = _shrunk(picture, 16), _shrunk(outline, 16)
    blocks = np.round(saturate(blocks, 1.3) * 5) / 5
    # The contour is the blocks outside the thing that have a neighbour inside.
    inside = np.pad(cover > 0.5, 1)
    around = inside[:-2, 1:-1] | inside[2:, 1:-1] | inside[1:-1, :-2] | inside[1:-1, 2:]
    rim = around & ~inside[1:-1, 1:-1]
    blocks[rim] *= 0.3
    size = len(picture)
    small = Image.fromarray((np.clip(blocks, 0, 1) * 255).astype(np.uint8))
    large = small.resize((size, size), Image.Resampling.NEAREST)
    return np.asarray(large, np.float32) / 255


def _shrunk(values: Array, side: int) -> Array:
    """Return a picture or channel of `side` x `side` pixels, each the mean of a block."""
    pixels = Image.fromarray((np.clip(values, 0, 1) * 255).astype(np.uint8))
    return np.asarray(pixels.resize((side, side), Image.Resampling.BOX), np.float32) / 255


@style("stained glass window")
def stained_glass(picture: Array, outline: Array, rng: Random) -> Array:
    """Set panes of strong colour in dark lead. A pane ends where the thing does."""
    size = len(picture)
    around, within = _panes(rng, size, 6), _panes(rng, size, 4)
    # The scene has 6 x 6 panes, numbers 0 to 35. The thing has 4 x 4 smaller ones behind them.
    pane = np.where(outline > 0.5, 36 + within, around)
    total = 36 + 16
    area = np.maximum(np.bincount(pane.ravel(), minlength=total), 1)
    means = [
        np.bincount(pane.ravel(), channel.ravel(), total) / area
        for channel in np.moveaxis(picture, -1, 0)
    ]
    flat = np.stack(means, -1)[pane].astype(np.float32)
    # The thing keeps its larger marks, such as eyes, inside the panes.
    detail = np.round(median(picture, 3) * 4) / 4
    colour = over(flat, detail.astype(np.float32), 0.2 + 0.65 * (outline > 0.5))
    light = 0.9 + 0.25 * any_cloud(rng, size)
    glass = np.clip(saturate(colour, 1.9) * light[..., None] * 1.05, 0, 1)
    # Lead runs wherever two neighbours belong to different panes.
    edge = np.zeros((size, size), bool)
    edge[:, 1:] |= pane[:, 1:] != pane[:, :-1]
    edge[1:] |= pane[1:] != pane[:-1]
    lead = np.clip(1.5 * blur(edge.astype(np.float32), 0.5), 0, 1)
    return over(glass, np.array([0.06, 0.06, 0.08], np.float32), lead)


def _panes(rng: Random, size: int, count: int) -> Array:
    """Return the number of every pixel's pane in an irregular window (size, size).

    It is a Voronoi pattern: a pixel belongs to the nearest of count x count moved centres.
    """
    y, x = (np.mgrid[:size, :size] * count / size).astype(np.float32)
    offset = rng.uniform(-0.32, 0.32, (2, count, count)).astype(np.float32)
    best, pane = np.full((size, size), np.inf, np.float32), np.zeros((size, size), np.int64)
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            row = np.clip(y.astype(int) + down, 0, count - 1)
            column = np.clip(x.astype(int) + right, 0, count - 1)
            from_y = y - row - 0.5 - offset[0][row, column]
            from_x = x - column - 0.5 - offset[1][row, column]
            distance = np.hypot(from_y, from_x)
            pane = np.where(distance < best, row * count + column, pane)
            best = np.minimum(best, distance)
    return pane


UKIYO_E = np.array(
    [
        [0.95, 0.90, 0.78], [0.86, 0.75, 0.55], [0.16, 0.24, 0.42], [0.36, 0.52, 0.66],
        [0.66, 0.78, 0.80], [0.76, 0.25, 0.18], [0.90, 0.56, 0.28], [0.36, 0.46, 0.30],
        [0.60, 0.66, 0.40], [0.13, 0.12, 0.15], [0.45, 0.30, 0.22], [0.62, 0.52, 0.50],
        [0.88, 0.66, 0.64],
    ],
    np.float32,
)  # fmt: skip


@style("woodblock print")
def woodblock_print(picture: Array, outline: Array, rng: Random) -> Array:
    """Print flat areas of a dozen muted inks and carve black contours."""
    size = len(picture)
    flat = median(picture, 5)
    # Every pixel takes the nearest of the inks. The eye sees differences of green most.
    weights = np.array([0.8, 1.2, 0.7], np.float32)
    nearest = ((flat[:, :, None] - UKIYO_E) ** 2 @ weights).argmin(-1)
    printed = blur(UKIYO_E[nearest], 0.35)
    y = np.arange(size)[:, None] * 64 / size
    grain = 0.035 * np.sin(2 * np.pi * (y / 5.0 + 1.2 * any_cloud(rng, size)))
    around = edges(np.repeat(outline[..., None], 3, 2), 3.0)
    contour = np.clip(1.5 * np.maximum(edges(flat, 3.5), around), 0, 0.95)
    return np.clip(over(printed * (1 + grain[..., None]), INK, contour), 0, 1)


@style("oil painting")
def oil_painting(picture: Array, outline: Array, rng: Random) -> Array:
    """Cover the canvas with short thick strokes that follow contours and swirl elsewhere."""
    size = len(picture)
    scale = size / 64
    canvas = Image.fromarray((saturate(blur(picture, 0.8), 1.3) * 255).astype(np.uint8))
    draw = ImageDraw.Draw(canvas)
    colours = saturate(blur(picture, 0.5), 1.45)
    down, right = np.gradient(blur(luma(picture), 1.8))
    swirl = 2 * np.pi * any_cloud(rng, size)
    # A stroke runs along the contour where there is one.
    strong = np.hypot(down, right) > 0.018 / scale
    angle = np.where(strong, np.arctan2(down, right) + np.pi / 2, swirl)
    for count, reach, width in ((150, 5.0, 3.6), (260, 2.6, 2.2)):
        places = rng.integers(size, size=(count, 2))
        tones = rng.uniform(-0.10, 0.10, count) * (width / 3.6)
        for (y, x), tone in zip(places, tones):
            if width < 3 and outline[y, x] < 0.3 and not strong[y, x] and tone > 0:
                continue  # broad strokes are enough for the background
            varied = np.clip(colours[y, x] * (1 + 1.3 * tone) + 0.5 * tone, 0, 1)
            red, green, blue = (varied * 255).astype(int)
            dx, dy = reach * scale * np.cos(angle[y, x]), reach * scale * np.sin(angle[y, x])
            ends = (x - dx, y - dy, x + dx, y + dy)
            fill = (int(red), int(green), int(blue))
            draw.line(ends, fill=fill, width=max(1, round(width * scale)))
    painted = np.asarray(canvas, np.float32) / 255
    # Thick paint catches the light on one side of every stroke.
    ridge = luma(painted) - luma(np.roll(painted, (1, 1), (0, 1)))
    return np.clip(painted + 0.22 * ridge[..., None], 0, 1)


@style("comic book drawing")
def comic_book(picture: Array, outline: Array, rng: Random) -> Array:
    """Paint flat strong colours, print dots in the shadows and ink every contour."""
    size = len(picture)
    flat = saturate(median(picture, 5), 1.6)
    bright = np.round(luma(flat) * 3 + 0.3) / 3
    colour = np.clip(flat * (bright / np.maximum(luma(flat), 0.05))[..., None], 0, 1)
    y, x = np.mgrid[:size, :size] * (64 / size)
    dots = np.hypot((x + y) % 4 - 2, (x - y) % 4 - 2) < 1.25
    shadow = (luma(flat) < 0.62) & dots & (outline < 0.5)
    colour = np.where(shadow[..., None], colour * 0.72, colour)
    around = edges(np.repeat(outline[..., None], 3, 2), 3.5)
    contour = np.clip(2.2 * np.maximum(edges(flat, 3.2), around), 0, 1)
    return over(colour, INK, contour)
