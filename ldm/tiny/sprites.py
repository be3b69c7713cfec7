"""Sprites: cut-outs of things, and which of them show a class.

They come from emoji families, clip art and rendered toys.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from jaxtyping import UInt8
from omegaconf import OmegaConf
from PIL import Image, ImageFilter, ImageOps

from ldm.errors import UserError, nearest

Array = np.ndarray
# "crown", "eyes", "neck" -> [x, y, half width], in fractions of the sprite
Anchors = dict[str, list[float]]
SPRITES = Path("models/tiny/sprites")
# What changes a sprite's pixels, which are not premultiplied.
Change = Callable[[UInt8[Array, "h w 4"]], UInt8[Array, "h w 4"]]
BORDER = 2  # transparent pixels around a sprite, so that its edge is smooth


@functools.cache
def read_sprite_table() -> dict[str, dict[str, Any]]:
    """Return class noun -> `icons` and other facts (see `world_sprites.yaml`)."""
    table = OmegaConf.to_container(OmegaConf.load(Path(__file__).with_name("world_sprites.yaml")))
    return cast(dict[str, dict[str, Any]], table)


class Sprite:
    """A cut-out at full, half and quarter size, and the light that a round body would have.

    `anchors` says where it can wear something. A thing without a head has none.
    """

    def __init__(self, path: Path):
        with Image.open(path) as image:
            self.anchors = anchors_of(path, image)
            trimmed = image.convert("RGBA")
        drawn = ImageOps.expand(trimmed, BORDER, (0, 0, 0, 0))
        alpha = np.asarray(drawn.getchannel("A"))
        self.width, self.height = drawn.size
        self.levels = _levels(drawn.convert("RGBa"))
        self.relief = _levels(_relief(drawn.getchannel("A")))

        # What touches the ground is in the lowest eighth.
        rows = np.flatnonzero(alpha.max(1) > 127)
        lowest = rows[-1] if len(rows) else self.height - 1
        lowest_eighth = alpha[max(0, lowest - self.height // 8) : lowest + 1]
        foot = np.flatnonzero(lowest_eighth.max(0) > 127)
        left, right = (foot[0], foot[-1] + 1) if len(foot) else (0, self.width)
        # As fractions of its width.
        self.foot_centre = float(left + right) / 2 / self.width
        self.foot_half = float(right - left) / 2 / self.width

    def level(self, number: int, finish: Change | None = None) -> Image.Image:
        """Return the sprite, premultiplied, at one of its sizes. `finish` may change its pixels."""
        if finish is None:
            return self.levels[number]
        straight = np.asarray(self.levels[number].convert("RGBA"))
        return Image.fromarray(finish(straight)).convert("RGBa")


def anchors_of(path: Path, image: Image.Image) -> Anchors:
    """Return where a sprite wears things. A toy's file says it; for drawings the table does."""
    written = getattr(image, "text", {}).get("anchors")
    if written is not None:
        return json.loads(written)
    of_class = read_sprite_table().get(path.parent.name, {}).get("anchors", {})
    for pattern, anchors in of_class.items():
        if path.match(pattern):
            return anchors
    return {}


def _levels(image: Image.Image) -> list[Image.Image]:
    """Return an image at full, half and quarter size; a small one has fewer."""
    return [image] + [image.reduce(factor) for factor in (2, 4) if min(image.size) >= 4 * factor]


def _relief(alpha: Image.Image) -> Image.Image:
    """Return the light from the upper left, as on a body that is thicker far from its outline.

    A value of 128 changes nothing; more is brighter.
    """
    for radius in (3, 6, 11):
        alpha = alpha.filter(ImageFilter.BoxBlur(radius))
    dy, dx = np.gradient(np.asarray(alpha, np.float32) / 255)
    light = np.clip(5.0 * (0.45 * dx + 0.9 * dy), -0.28, 0.16)
    return Image.fromarray((128 + 128 * light).astype(np.uint8))


def design(sprite: Path) -> str:
    """Return the name of a sprite's design, which its renderings share.

    `fluent_3d-dog.png` and `fluent-dog.png` are `fluent-dog`; `toy-dog03@back.png` is `toy-dog03`.
    """
    family, _, icon = sprite.stem.partition("@")[0].partition("-")
    return f"{family.partition('_')[0]}-{icon}"


def held_out_of(sprites: Sequence[Path], fraction: float) -> set[Path]:
    """Return the sprites of the designs that are kept from training.

    These are at least one design, and never all. Each design is chosen by a hash of its own name,
    so that a new design changes nothing for the others.
    """
    places = {design(path): _place_in_order(design(path)) for path in sprites}
    in_order = sorted(places, key=lambda name: places[name])
    below = sum(place < fraction for place in places.values())
    count = min(max(below, 1), len(in_order) - 1)
    chosen = in_order[:count]
    return {path for path in sprites if design(path) in chosen}


def _place_in_order(name: str) -> float:
    """Return a number from 0 to 1 that is a function of the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def find_sprites(root: str | Path) -> dict[str, list[Path]]:
    """Return class noun -> its sprites, sorted by name.

    Raises:
        UserError: there are none.
    """
    root = Path(root).expanduser()
    sprites = {
        folder.name: sorted(folder.glob("*.png"))
        for folder in sorted(root.glob("*"))
        if folder.is_dir()
    }
    sprites = {class_word: paths for class_word, paths in sprites.items() if paths}
    if not sprites:
        raise UserError(
            f"{root}: no sprites; fetch them with: "
            f"python scripts/tiny/fetch_sprites.py --outdir {root}"
        )
    return sprites


def choose_classes(classes: str | Sequence[str], found: dict[str, list[Path]]) -> list[str]:
    """Return the classes that "all", "narrow" or a list of nouns means.

    Raises:
        UserError: there is no such class, or the list is empty.
    """
    if classes == "all":
        return list(found)
    if classes == "narrow":
        narrow = [
            c for c, entry in read_sprite_table().items() if entry.get("narrow") and c in found
        ]
        return narrow or list(found)
    wanted = [classes] if isinstance(classes, str) else list(classes)
    for class_word in wanted:
        if class_word not in found:
            hint = nearest(class_word, {*found, "all", "narrow"})
            raise UserError(
                f"classes: unknown class {class_word!r}{hint}; there are {', '.join(found)}"
            )
    if not wanted:
        raise UserError("classes: the list is empty; expected all, narrow or a list of nouns")
    return list(dict.fromkeys(wanted))
