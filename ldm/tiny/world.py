"""The tiny world: everyday things from several emoji families on drawn scenes, with captions that say what is there.

A picture is a function of its generator alone. `scripts/tiny/fetch_sprites.py` fetches the sprites that
`world_sprites.yaml` lists; `ldm.tiny.scenes` draws what is behind them.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, UInt8
from omegaconf import OmegaConf
from PIL import Image, ImageFilter, ImageOps
from torch.utils.data import Dataset

from ldm.data.resizing import to_array
from ldm.errors import UserError, nearest
from ldm.rng import generator as generator_of
from ldm.tiny.scenes import PLAIN, SCENES, rgb

Array = np.ndarray

SPRITES = Path("models/tiny/sprites")
SUPERSAMPLING = 2  # a sprite is turned at twice its size and averaged
BORDER = 2  # transparent pixels around a sprite, so that its edge is smooth
COLOURED, COLOUR_SAID, SCENE_SAID, PLAIN_SCENE = 0.3, 0.85, 0.8, 0.2  # probabilities
ON_WATER = "floating on top of water"
# What a colour word makes of an animal or a thing: its shadows, its middle tones, its highlights.
COLOURS = {
    "red": ("#5e0a0f", "#d92b2b", "#ff9a8f"),
    "orange": ("#7a3208", "#f5851f", "#ffd2a0"),
    "yellow": ("#7d5a05", "#f7cf2b", "#fff3b0"),
    "green": ("#0d4016", "#35a53f", "#b4ecaa"),
    "blue": ("#0c1f66", "#2f63dd", "#a9ccff"),
    "purple": ("#2e0d55", "#8036bf", "#d8b0f5"),
    "pink": ("#8a2457", "#f277b0", "#ffd3e6"),
    "brown": ("#33190b", "#84522c", "#c9a27c"),
    "black": ("#060608", "#2a2a30", "#6a6a74"),
    "white": ("#9aa0a8", "#e9ebee", "#ffffff"),
    "gray": ("#36393f", "#868b93", "#d0d4d9"),
}
LIGHT = {"at night": (0.62, 0.68, 0.92), "in the jungle": (0.90, 1.0, 0.88), "in the snow": (0.98, 1.0, 1.04)}
PHRASES = (
    ("a photo of {}", 0.40),
    ("photo of {}", 0.15),
    ("{}", 0.30),
    ("a picture of {}", 0.05),
    ("an image of {}", 0.05),
    ("a close-up photo of {}", 0.05),
)
PLURAL = {"glasses"}


@functools.cache
def read_sprite_table() -> dict[str, dict[str, Any]]:
    """Class noun -> `icons`, and where given `without`, `narrow` and `mirror` (see `world_sprites.yaml`)."""
    table = OmegaConf.to_container(OmegaConf.load(Path(__file__).with_name("world_sprites.yaml")))
    return cast(dict[str, dict[str, Any]], table)


@dataclass(frozen=True)
class Description:
    """What a picture shows, and its caption, which need not tell it all. `colour` is None for a natural one."""

    class_word: str
    sprite: Path
    scene: str
    colour: str | None
    caption: str


# ---- captions ---------------------------------------------------------------------------------------------


def with_article(noun: str) -> str:
    """ "a dog", "an owl", "a unicorn"; a plural as it is."""
    if noun.split()[-1] in PLURAL:
        return noun
    vowel = noun[0] in "aeiou" and not noun.startswith("uni")
    return f"{'an' if vowel else 'a'} {noun}"


def compose_caption(rng: np.random.Generator, class_word: str, scene: str | None, colour: str | None) -> str:
    """One of several phrasings, such as "a photo of a red car on the beach"."""
    noun = f"{colour} {class_word}" if colour else class_word
    phrases, shares = zip(*PHRASES)
    caption = phrases[rng.choice(len(phrases), p=shares)].format(with_article(noun))
    return f"{caption} {scene}" if scene else caption


# ---- sprites ----------------------------------------------------------------------------------------------


class Sprite:
    """A thing cut out, premultiplied at full, half and quarter size, with the light that a round body would have."""

    def __init__(self, path: Path):
        with Image.open(path) as image:
            drawn = ImageOps.expand(image.convert("RGBA"), BORDER, (0, 0, 0, 0))
        alpha = np.asarray(drawn.getchannel("A"))
        self.width, self.height = drawn.size
        self.levels = _levels(drawn.convert("RGBa"))
        self.relief = _levels(_relief(drawn.getchannel("A")))
        rows = np.flatnonzero(alpha.max(1) > 127)
        lowest = rows[-1] if len(rows) else self.height - 1
        foot = np.flatnonzero(alpha[max(0, lowest - self.height // 8) : lowest + 1].max(0) > 127)
        left, right = (foot[0], foot[-1] + 1) if len(foot) else (0, self.width)
        # Where it touches the ground, as fractions of its width.
        self.foot_centre = float(left + right) / 2 / self.width
        self.foot_half = float(right - left) / 2 / self.width

    def level(self, number: int, colour: str | None = None) -> Image.Image:
        """The sprite at one of its sizes, in a colour or (None) its own."""
        if colour is None:
            return self.levels[number]
        straight = np.asarray(self.levels[number].convert("RGBA"))
        return Image.fromarray(recoloured(straight, colour)).convert("RGBa")


def _levels(image: Image.Image) -> list[Image.Image]:
    return [image] + [image.reduce(factor) for factor in (2, 4) if min(image.size) >= 4 * factor]


def _relief(alpha: Image.Image) -> Image.Image:
    """Light from the upper left on a body that is thicker far from its outline, as 8 bits: 128 stays as it is."""
    for radius in (3, 6, 11):
        alpha = alpha.filter(ImageFilter.BoxBlur(radius))
    dy, dx = np.gradient(np.asarray(alpha, np.float32) / 255)
    return Image.fromarray((128 + 128 * np.clip(5.0 * (0.45 * dx + 0.9 * dy), -0.28, 0.16)).astype(np.uint8))


@functools.cache
def _ramp(colour: str) -> Float[Array, "256 3"]:
    shadow, middle, light = (rgb(c) * 255 for c in COLOURS[colour])
    t = np.linspace(0, 2, 256)[:, None]
    return np.where(t < 1, shadow + (middle - shadow) * t, middle + (light - middle) * (t - 1)).astype(np.float32)


def recoloured(pixels: UInt8[Array, "h w 4"], colour: str) -> UInt8[Array, "h w 4"]:
    """The sprite in one colour, its light and dark kept, and the whites of one that has colours."""
    straight = pixels[..., :3].astype(np.float32)
    visible = pixels[..., 3] > 127
    if not visible.any():
        return pixels
    luma = straight @ np.array([0.3, 0.59, 0.11], np.float32)
    low, middle, high = np.percentile(luma[visible], (3, 50, 97))
    dark, bright = (luma - low) / max(middle - low, 40) - 1, (luma - middle) / max(high - middle, 40)
    tone = np.clip(127.5 + 127.5 * np.where(luma < middle, np.maximum(dark, -1), np.minimum(bright, 1)), 0, 255)
    toned = _ramp(colour)[tone.astype(np.uint8)]
    value = straight.max(-1)
    saturation = (value - straight.min(-1)) / np.maximum(value, 1)
    if (saturation[visible] > 0.25).mean() > 0.5:
        keep = np.clip((value - 200) / 30, 0, 1) * np.clip((0.16 - saturation) / 0.06, 0, 1)
        toned += (straight - toned) * keep[..., None]
    return np.concatenate([toned.astype(np.uint8), pixels[..., 3:]], -1)


def design(sprite: Path) -> str:
    """What the renderings of one drawing share: `fluent_3d-dog.png` and `fluent-dog.png` are `fluent-dog`."""
    family, _, icon = sprite.stem.partition("-")
    return f"{family.partition('_')[0]}-{icon}"


def _held_out(sprites: Sequence[Path], fraction: float) -> set[Path]:
    """The share of a class's designs that a hash of their names picks: at least one, and never all."""
    designs = sorted({design(path) for path in sprites}, key=lambda name: hashlib.sha256(name.encode()).digest())
    count = min(len(designs) - 1, math.ceil(fraction * len(designs)))
    return {path for path in sprites if design(path) in designs[:count]}


# ---- putting a sprite on a scene -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where a sprite stands, in fractions of the picture's side: its middle, its foot, its size, how it is turned."""

    x: float
    bottom: float
    width: float
    height: float
    foot_x: float
    foot_half: float
    angle: float
    mirrored: bool

    @classmethod
    def random(cls, rng: np.random.Generator, sprite: Sprite, longest: float, may_mirror: bool) -> Place:
        scale, stretch = longest / max(sprite.width, sprite.height), rng.uniform(0.95, 1.05)
        width, height = scale * sprite.width * stretch, scale * sprite.height / stretch
        room = max(0.0, 0.98 - width) / 2
        x = 0.5 + float(np.clip(rng.normal(0, 0.05), -room, room))
        bottom = max(height + 0.03, rng.uniform(0.84, 0.96))
        mirrored = bool(may_mirror and rng.random() < 0.5)
        foot_x = x + (sprite.foot_centre - 0.5) * width * (-1 if mirrored else 1)
        foot_half = max(sprite.foot_half, 0.12) * width
        return cls(x, bottom, width, height, foot_x, foot_half, math.radians(rng.normal(0, 3.0)), mirrored)

    def render(self, sprite: Sprite, size: int, colour: str | None, roundness: float) -> Float[Array, "h w 4"]:
        """The sprite on an empty picture, premultiplied, 0 to 255."""
        n = size * SUPERSAMPLING
        enough = [k for k, level in enumerate(sprite.levels) if level.height >= 0.9 * self.height * n]
        number = enough[-1] if enough else 0
        source, relief = sprite.level(number, colour), sprite.relief[number]
        inverse = self._inverse(source.size, n)
        turned = [
            image.transform((n, n), Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR).reduce(SUPERSAMPLING)
            for image in (source, relief)
        ]
        layer, light = (np.array(image, np.float32) for image in turned)
        layer[..., :3] *= 1 + roundness * (light[..., None] / 128 - 1)
        return layer

    def _inverse(self, source: tuple[int, int], n: int) -> tuple[float, ...]:
        """The affine map from a picture of n pixels back to the source, whose middle stays the middle."""
        fx, fy = source[0] / (self.width * n), source[1] / (self.height * n)
        c, s, flip = math.cos(self.angle), math.sin(self.angle), -1 if self.mirrored else 1
        a, b, d, e = flip * fx * c, flip * fx * s, -fy * s, fy * c
        x, y = self.x * n, (self.bottom - self.height / 2) * n
        return a, b, source[0] / 2 - a * x - b * y, d, e, source[1] / 2 - d * x - e * y


def compose(
    background: UInt8[Array, "h w 3"],
    layer: Float[Array, "h w 4"],
    place: Place,
    afloat: bool,
    rng: np.random.Generator,
) -> Float[Array, "h w 3"]:
    """The sprite with its shadow on the scene; one that floats is sunk a little instead."""
    axis = (np.arange(len(background), dtype=np.float32) + 0.5) / len(background)
    picture = background.astype(np.float32)
    if afloat:
        layer = _sunk(layer, axis, place.bottom - 0.14 * place.height, rng)
        foam = _bump(axis, place.x, 0.6 * place.width, 4)
        foam = foam * _bump(axis, place.bottom - 0.13 * place.height + 0.015, 0.022, 2)[:, None]
        picture += (255 - picture) * (0.55 * foam)[..., None]
    else:
        picture *= 1 - _shadow(axis, place, rng)[..., None]
    side = rng.uniform(-0.1, 0.1) * (axis - 0.5)[None, :, None]  # a little more light on one side
    return picture * (1 - layer[..., 3:] / 255) + layer[..., :3] * (1 + side)


def _shadow(axis: Array, place: Place, rng: np.random.Generator) -> Float[Array, "h w"]:
    """The dark line where it stands, and the soft shadow it casts."""
    contact = _bump(axis, place.foot_x, 1.1 * place.foot_half, 4)
    contact = contact * _bump(axis, place.bottom - 0.012, 0.03, 2)[:, None]
    reach = max(1.35 * place.foot_half, 0.3 * place.width)
    cast = _bump(axis, place.foot_x + rng.uniform(-0.3, 0.3) * place.foot_half, reach, 2)
    cast = cast * _bump(axis, place.bottom - 0.03, 0.075, 2)[:, None]
    return np.minimum(rng.uniform(0.3, 0.5) * contact + rng.uniform(0.25, 0.4) * cast, 0.7)


def _bump(axis: Array, centre: float, width: float, power: int) -> Array:
    return np.exp(-(np.abs((axis - centre) / width) ** power))


def _sunk(layer: Float[Array, "h w 4"], axis: Array, level: float, rng: np.random.Generator) -> Float[Array, "h w 4"]:
    """What is below the wavy water line shows through faintly."""
    waves = level + 0.012 * np.sin(22 * axis + rng.uniform(0, 6.3))
    depth = (axis[:, None] - waves[None]) * len(axis)
    return layer * (1 - 0.75 * np.clip(depth + 0.5, 0, 1))[..., None]


# ---- the data set -------------------------------------------------------------------------------------------


class World(Dataset):
    """Pictures with captions, `{"image": (size, size, 3) float32 in [-1, 1], "caption": str}`, `length` an epoch.

    `classes` is "all", "narrow" (the easy ones) or a list of nouns. A fraction `held_out` of each class's designs
    is left out of the split "train" and makes up the split "test". A class comes up in proportion to its number of
    sprites to the power `balance` (0 makes all equal, more gives the varied ones more room) times its factor in
    `weights` (1 where it has none): those that are hard to learn can have more. With `labels` an example
    also holds the "class_word", the "scene" and the "colour" ("" for a natural one) that are pictured, whatever the
    caption says.

    Raises:
        UserError: no sprites, an unknown class, or a parameter out of its range.
    """

    def __init__(
        self,
        sprites: str | Path = SPRITES,
        size: int = 64,
        classes: str | Sequence[str] = "all",
        length: int = 100_000,
        split: str = "train",
        held_out: float = 0.0,
        labels: bool = False,
        balance: float = 0.0,
        weights: Mapping[str, float] | None = None,
    ):
        for name, value in (("size", size), ("length", length)):
            if not isinstance(value, int) or value < 1:
                raise UserError(f"{name}: expected a positive number, got {value!r}")
        if split not in ("train", "test"):
            raise UserError(f"split: expected train or test, got {split!r}")
        if not 0 <= held_out < 1 or (split == "test" and held_out == 0):
            raise UserError(f"held_out: expected a fraction below 1, above 0 for split test; got {held_out!r}")
        self.root, self.size, self.length, self.labels = Path(sprites), size, length, labels
        found = find_sprites(sprites)
        self.sprites: dict[str, list[Path]] = {}
        for class_word in _choose(classes, found):
            out = _held_out(found[class_word], held_out) if held_out else set()
            kept = [path for path in found[class_word] if (path in out) == (split == "test")]
            if kept:
                self.sprites[class_word] = kept
        self.classes = list(self.sprites)
        if not self.classes:
            raise UserError(f"{sprites}: no sprite is left for split {split}; its classes have a single design each")
        self._shares = self._frequencies(balance, weights or {})
        table = read_sprite_table()
        self._mirrored = {c for c in self.classes if table.get(c, {}).get("mirror", True)}
        self._sprites: dict[Path, Sprite] = {}

    def _frequencies(self, balance: float, weights: Mapping[str, float]) -> Array | None:
        """How often each class comes up; None when all are equal."""
        for class_word, weight in weights.items():
            if class_word not in self.classes:
                hint = nearest(class_word, set(self.classes))
                raise UserError(f"weights: no class {class_word!r}{hint} among {', '.join(self.classes)}")
            if not weight > 0:
                raise UserError(f"weights: expected a positive factor for {class_word!r}, got {weight!r}")
        if balance == 0 and not weights:
            return None
        shares = np.array(
            [len(self.sprites[class_word]) ** balance * weights.get(class_word, 1.0) for class_word in self.classes]
        )
        return shares / shares.sum()

    @property
    def n_images(self) -> int:
        """How many examples an epoch has."""
        return self.length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        return self.example(index, generator_of("world", index))

    def example(self, index: int, generator: torch.Generator | None = None) -> dict[str, Any]:
        """A picture that `generator` alone decides on (None: torch's global one); `index` is not read."""
        rng = _numpy_rng(generator)
        seen = self._describe(rng)
        example = {"image": self._draw(seen, rng), "caption": seen.caption}
        if self.labels:
            example |= {"class_word": seen.class_word, "scene": seen.scene, "colour": seen.colour or ""}
        return example

    def describe(self, generator: torch.Generator) -> Description:
        """What `example` shows for a generator in this state."""
        return self._describe(_numpy_rng(generator))

    def _describe(self, rng: np.random.Generator) -> Description:
        class_word = _pick(rng, self.classes, self._shares)
        sprite = _pick(rng, self.sprites[class_word])
        scene = _pick(rng, PLAIN if rng.random() < PLAIN_SCENE else _placed_scenes())
        colour = _pick(rng, list(COLOURS)) if rng.random() < COLOURED else None
        said_scene, said_colour = rng.random(2) < (SCENE_SAID, COLOUR_SAID)
        caption = compose_caption(rng, class_word, scene if said_scene else None, colour if said_colour else None)
        return Description(class_word, sprite, scene, colour, caption)

    def _draw(self, seen: Description, rng: np.random.Generator) -> Float[Array, "h w 3"]:
        if seen.sprite not in self._sprites:
            self._sprites[seen.sprite] = Sprite(seen.sprite)
        sprite = self._sprites[seen.sprite]
        background = SCENES[seen.scene](rng, self.size)
        crowded = seen.scene.startswith("with ")  # what is in the background has to be seen, too
        longest = rng.uniform(0.65, 0.82 if crowded else 0.92)
        place = Place.random(rng, sprite, longest, seen.class_word in self._mirrored)
        layer = place.render(sprite, self.size, seen.colour, roundness=rng.uniform(0, 1))
        layer[..., :3] *= np.array(LIGHT.get(seen.scene, (1, 1, 1)), np.float32) * np.float32(rng.uniform(0.93, 1.06))
        picture = compose(background, layer, place, seen.scene == ON_WATER, rng)
        return to_array(np.clip(picture, 0, 255).round())


def find_sprites(root: str | Path) -> dict[str, list[Path]]:
    """Class noun -> its sprites, sorted by name.

    Raises:
        UserError: there are none.
    """
    root = Path(root).expanduser()
    sprites = {folder.name: sorted(folder.glob("*.png")) for folder in sorted(root.glob("*")) if folder.is_dir()}
    sprites = {class_word: paths for class_word, paths in sprites.items() if paths}
    if not sprites:
        raise UserError(f"{root}: no sprites; fetch them with: python scripts/tiny/fetch_sprites.py --outdir {root}")
    return sprites


def _choose(classes: str | Sequence[str], found: dict[str, list[Path]]) -> list[str]:
    if classes == "all":
        return list(found)
    if classes == "narrow":
        narrow = [c for c, entry in read_sprite_table().items() if entry.get("narrow") and c in found]
        return narrow or list(found)
    wanted = [classes] if isinstance(classes, str) else list(classes)
    for class_word in wanted:
        if class_word not in found:
            hint = nearest(class_word, {*found, "all", "narrow"})
            raise UserError(f"classes: unknown class {class_word!r}{hint}; there are {', '.join(found)}")
    if not wanted:
        raise UserError("classes: the list is empty; expected all, narrow or a list of nouns")
    return list(dict.fromkeys(wanted))


@functools.cache
def _placed_scenes() -> list[str]:
    return [scene for scene in SCENES if scene not in PLAIN]


def _numpy_rng(generator: torch.Generator | None) -> np.random.Generator:
    return np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))


def _pick(rng: np.random.Generator, options: Sequence[Any], shares: Array | None = None) -> Any:
    return options[int(rng.integers(len(options)) if shares is None else rng.choice(len(options), p=shares))]
