"""The tiny world: everyday things on drawn scenes, with captions that say what is there.

A picture is a function of its random generator alone. `scripts/tiny/fetch_sprites.py` and
`scripts/tiny/render_toys.py` make the sprites of the things; `ldm.tiny.scenes` draws what is behind
them. A thing may have a colour, a material or a pattern. It may wear an accessory and be seen from
a side. The whole picture may be drawn in a style.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch.utils.data import Dataset

from ldm.data.resizing import to_array
from ldm.errors import UserError, nearest
from ldm.rng import generator as generator_of
from ldm.tiny.accessories import ACCESSORIES, wearable, worn
from ldm.tiny.captions import Words, compose_caption, with_article
from ldm.tiny.colours import COLOURS, recoloured
from ldm.tiny.materials import MATERIALS, PATTERNS
from ldm.tiny.placing import Place, compose
from ldm.tiny.scenes import PLAIN, SCENES
from ldm.tiny.sprites import (
    SPRITES,
    Change,
    Sprite,
    choose_classes,
    design,
    find_sprites,
    held_out_of,
    read_sprite_table,
)
from ldm.tiny.styles import STYLES
from ldm.tiny.views import LEFT, RIGHT, VIEWS, camera, fitting, in_profile

__all__ = [
    "COLOURS",
    "SPRITES",
    "Description",
    "World",
    "design",
    "find_sprites",
    "read_sprite_table",
    "recoloured",
    "with_article",
]

Array = np.ndarray

# How often a picture has a colour, and how often its caption says the colour and the scene.
COLOURED, COLOUR_SAID, SCENE_SAID, PLAIN_SCENE = 0.3, 0.85, 0.8, 0.2
# How often a picture has each of these. Its caption always says so.
MADE_OF, PATTERNED, DRESSED, VIEWED, STYLED = 0.14, 0.10, 0.20, 0.30, 0.22
SEARCHED = 20_000  # descriptions that are made, at most, for one that shows a certain word
LABELS = ("class_word", "scene", "colour", "material", "accessory", "view", "style")
# What the ground of some scenes does with the thing on it.
GROUND = {
    "floating on top of water": "water",
    "floating in an ocean of milk": "water",
    "on top of a mirror": "mirror",
}
# The colour of the light in some scenes: factors of red, green and blue.
LIGHT = {
    "at night": (0.62, 0.68, 0.92),
    "in the jungle": (0.90, 1.0, 0.88),
    "in the snow": (0.98, 1.0, 1.04),
}


@dataclass(frozen=True)
class Description:
    """What a picture shows, and its caption, which may leave the scene or the colour out.

    `colour`, `material`, `accessory`, `view` and `style` are None where the picture has nothing of
    the kind.
    """

    class_word: str
    sprite: Path
    scene: str
    colour: str | None
    caption: str
    material: str | None = None
    accessory: str | None = None
    view: str | None = None
    style: str | None = None


class World(Dataset):
    """Pictures with captions: `{"image": (size, size, 3) float32 in [-1, 1], "caption": str}`.

    Args:
        sprites: folder of the sprites, one folder of PNGs for each class.
        size: side of a picture, pixels.
        classes: "all", "narrow" (the easy ones) or a list of nouns.
        length: how many pictures an epoch has.
        split: "train", or "test" for the designs that are held out of it.
        held_out: share of each class's designs that the split "test" has.
        labels: an example also says what is pictured, whatever its caption says, under the names of
            `LABELS`; "" means none.
        balance: a class comes up in proportion to its number of sprites to this power. 0 makes all
            classes equal; more makes the varied ones more frequent.
        weights: class -> a factor on that, for classes that are hard to learn; 1 where not given.
        plain: leave out materials, accessories, views and styles.
        showing: words of these four kinds. Every picture shows one of them, and nothing else of
            these kinds. Each word comes up equally often. Without any, the usual frequencies hold.

    Raises:
        UserError: no sprites, an unknown class or word, or a parameter out of its range.
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
        plain: bool = False,
        showing: Sequence[str] = (),
    ):
        for name, value in (("size", size), ("length", length)):
            if not isinstance(value, int) or value < 1:
                raise UserError(f"{name}: expected a positive number, got {value!r}")
        if split not in ("train", "test"):
            raise UserError(f"split: expected train or test, got {split!r}")
        if not 0 <= held_out < 1 or (split == "test" and held_out == 0):
            raise UserError(
                f"held_out: expected a fraction below 1, above 0 for split test; got {held_out!r}"
            )
        self.root, self.size, self.length = Path(sprites), size, length
        self.labels, self.plain = labels, plain
        self.showing = _known_words(showing)
        if plain and self.showing:
            raise UserError("showing: a plain world has no such words; leave out plain")
        # The sprites of this split, by class. A class needs one that shows no view in particular.
        found = find_sprites(sprites)
        self.sprites: dict[str, list[Path]] = {}
        for class_word in choose_classes(classes, found):
            out = held_out_of(found[class_word], held_out) if held_out else set()
            kept = [path for path in found[class_word] if (path in out) == (split == "test")]
            if fitting("", kept, class_word, ()):
                self.sprites[class_word] = kept
        self.classes = list(self.sprites)
        if not self.classes:
            raise UserError(
                f"{sprites}: no sprite is left for split {split}; "
                "its classes have a single design each"
            )
        self._shares = self._frequencies(balance, weights or {})

        # What the table says of each class: whether its mirror image is as good, and which drawings
        # are in profile.
        table = read_sprite_table()
        self._mirrored = {c for c in self.classes if table.get(c, {}).get("mirror", True)}
        self._choices: dict[str, dict[str, list[Path]]] = {}
        for class_word in self.classes:
            sides = table.get(class_word, {}).get("sides", ())
            self._choices[class_word] = self._sprites_by_view(class_word, sides)
        self._sprites: dict[Path, Sprite] = {}

    def _sprites_by_view(self, class_word: str, sides: Sequence[str]) -> dict[str, list[Path]]:
        """Return the views that a class has, and the sprites that can show each.

        "" stands for no view in particular.
        """
        by_view: dict[str, list[Path]] = {}
        for view in ("", *VIEWS):
            sprites = fitting(view, self.sprites[class_word], class_word, sides)
            if sprites:
                by_view[view] = sprites
        return by_view

    def _frequencies(self, balance: float, weights: Mapping[str, float]) -> Array | None:
        """Return how often each class comes up; None when all are equal."""
        for class_word, weight in weights.items():
            if class_word not in self.classes:
                hint = nearest(class_word, set(self.classes))
                raise UserError(
                    f"weights: no class {class_word!r}{hint} among {', '.join(self.classes)}"
                )
            if not weight > 0:
                raise UserError(
                    f"weights: expected a positive factor for {class_word!r}, got {weight!r}"
                )
        if balance == 0 and not weights:
            return None
        shares = np.array(
            [len(self.sprites[c]) ** balance * weights.get(c, 1.0) for c in self.classes]
        )
        return shares / shares.sum()

    @property
    def n_images(self) -> int:
        """Return how many examples an epoch has."""
        return self.length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        return self.example(index, generator_of("world", index))

    def example(self, index: int, generator: torch.Generator | None = None) -> dict[str, Any]:
        """Return a picture that depends on `generator` alone, by default torch's global one.

        `index` is not read.
        """
        rng = _numpy_rng(generator)
        seen = self._describe(rng)
        example = {"image": self._draw(seen, rng), "caption": seen.caption}
        if self.labels:
            example |= {name: getattr(seen, name) or "" for name in LABELS}
        return example

    def describe(self, generator: torch.Generator) -> Description:
        """Return what `example` shows for a generator in this state."""
        return self._describe(_numpy_rng(generator))

    # ---- what a picture shows --------------------------------------------------------------------

    def _describe(self, rng: np.random.Generator) -> Description:
        """Choose what a picture shows, and how its caption says it."""
        if not self.showing:
            return self._describe_any(rng)
        word = _pick(rng, self.showing)
        for _ in range(SEARCHED):
            seen = self._describe_any(rng)
            shown = (seen.material, seen.accessory, seen.view, seen.style)
            if [said for said in shown if said] == [word]:
                return seen
        raise UserError(
            f"showing: {SEARCHED} pictures of {', '.join(self.classes)} were tried, and none shows "
            f"{word!r} alone: choose other classes, or leave the word out"
        )

    def _describe_any(self, rng: np.random.Generator) -> Description:
        """Choose as the frequencies at the top of this file say."""
        # The thing, the scene and the colour.
        class_word = _pick(rng, self.classes, self._shares)
        view = self._choose_view(rng, class_word)
        sprite = _pick(rng, self._choices[class_word][view])
        scene = _pick(rng, PLAIN if rng.random() < PLAIN_SCENE else _placed_scenes())
        colour = _pick(rng, list(COLOURS)) if rng.random() < COLOURED else None

        # What it is made of, what it wears, and how it is drawn. A material has its own colour. A
        # thing that is close or far away wears nothing, and is drawn in no style.
        material = accessory = style = None
        if not self.plain:
            material = self._choose_material(rng)
            colour = None if material in MATERIALS else colour
            can_wear = wearable(self._sprite(sprite).anchors, camera(sprite))
            at_usual_distance = view not in ("close-up", "far away")
            if can_wear and at_usual_distance and rng.random() < DRESSED:
                accessory = _pick(rng, can_wear)
            if at_usual_distance and rng.random() < STYLED:
                style = _pick(rng, list(STYLES))

        # The caption, which may leave the scene or the colour out.
        said_scene, said_colour = rng.random(2) < (SCENE_SAID, COLOUR_SAID)
        words = Words(
            class_word,
            scene=scene if said_scene else "",
            colour=colour if colour and said_colour else "",
            material=material or "",
            accessory=accessory or "",
            view=view,
            style=style or "",
        )
        caption = compose_caption(rng, words)
        return Description(
            class_word, sprite, scene, colour, caption, material, accessory, view or None, style
        )

    def _choose_view(self, rng: np.random.Generator, class_word: str) -> str:
        """Choose one of the views that a class has, or "" for none in particular."""
        views = [view for view in self._choices[class_word] if view]
        if self.plain or rng.random() >= VIEWED:
            return ""
        return _pick(rng, views)

    @staticmethod
    def _choose_material(rng: np.random.Generator) -> str | None:
        """Choose a material, a pattern, or nothing."""
        chance = rng.random()
        if chance < MADE_OF:
            return _pick(rng, list(MATERIALS))
        if chance < MADE_OF + PATTERNED:
            return _pick(rng, list(PATTERNS))
        return None

    # ---- how it is drawn -------------------------------------------------------------------------

    def _sprite(self, path: Path) -> Sprite:
        """Return a sprite, which is read once."""
        if path not in self._sprites:
            self._sprites[path] = Sprite(path)
        return self._sprites[path]

    def _draw(self, seen: Description, rng: np.random.Generator) -> Float[Array, "h w 3"]:
        """Draw what a description says."""
        sprite = self._sprite(seen.sprite)
        background = SCENES[seen.scene](rng, self.size)

        # Where the thing stands, and which way it looks.
        place = self._place(seen, sprite, rng)
        finish = self._finish(seen, rng)
        layer = place.render(sprite, self.size, finish, roundness=rng.uniform(0, 1))
        if seen.accessory:
            layer = place.dress(sprite, layer, worn(rng, seen.accessory))

        # The light of the scene falls on it, and it throws a shadow.
        light = np.array(LIGHT.get(seen.scene, (1, 1, 1)), np.float32)
        layer[..., :3] *= light * np.float32(rng.uniform(0.93, 1.06))
        ground = GROUND.get(seen.scene, "")
        picture = np.clip(compose(background, layer, place, ground, rng), 0, 255)

        # A style changes the whole picture.
        if seen.style:
            outline = layer[..., 3] / 255
            styled = STYLES[seen.style](picture.astype(np.float32) / 255, outline, rng)
            picture = np.clip(styled, 0, 1) * 255
        return to_array(picture.round())

    def _place(self, seen: Description, sprite: Sprite, rng: np.random.Generator) -> Place:
        """Choose where the thing stands."""
        # What is in the background has to be seen, too: then the thing is smaller.
        has_background = seen.scene.startswith("with ")
        longest, bottom = rng.uniform(0.65, 0.82 if has_background else 0.92), (0.84, 0.96)
        if seen.accessory:
            longest = min(longest, rng.uniform(0.58, 0.68))  # a hat needs room
        if GROUND.get(seen.scene) == "mirror":
            bottom = (0.74, 0.8)  # room for its reflection
        if seen.view == "far away":
            longest, bottom = rng.uniform(0.26, 0.36), (0.68, 0.82)
        if seen.view == "close-up":
            longest, bottom = rng.uniform(1.3, 1.6), (1.2, 1.5)
        return Place.random(rng, sprite, longest, self._mirror(seen, rng), bottom)

    def _mirror(self, seen: Description, rng: np.random.Generator) -> bool:
        """Choose whether to mirror the sprite. A view decides it where it names a side."""
        toss = bool(rng.random() < 0.5)
        if seen.view not in (LEFT, RIGHT):
            return toss and seen.class_word in self._mirrored
        sides = read_sprite_table().get(seen.class_word, {}).get("sides", ())
        assert in_profile(seen.sprite, sides)
        # Toys are turned to the right, drawings to the left.
        looks_right = camera(seen.sprite) is not None
        return looks_right == (seen.view == LEFT)

    @staticmethod
    def _finish(seen: Description, rng: np.random.Generator) -> Change | None:
        """Return what changes the sprite's pixels: its colour, then its material or pattern."""
        if seen.colour is None and seen.material is None:
            return None
        change = {**MATERIALS, **PATTERNS}.get(seen.material or "")

        def finish(pixels: Array) -> Array:
            if seen.colour is not None:
                pixels = recoloured(pixels, seen.colour)
            return change(pixels, rng) if change else pixels

        return finish


def _known_words(words: Sequence[str]) -> list[str]:
    """Check that a world can show these words, and return them."""
    known = {*MATERIALS, *PATTERNS, *ACCESSORIES, *VIEWS, *STYLES}
    for word in words:
        if word not in known:
            raise UserError(f"showing: the world does not know {word!r}{nearest(word, known)}")
    return list(words)


@functools.cache
def _placed_scenes() -> list[str]:
    """Return the scenes that are places, not plain backgrounds."""
    return [scene for scene in SCENES if scene not in PLAIN]


def _numpy_rng(generator: torch.Generator | None) -> np.random.Generator:
    """Make NumPy's generator from a number that torch's draws."""
    return np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))


def _pick(rng: np.random.Generator, options: Sequence[object], shares: Array | None = None) -> Any:
    """Choose one of the options: all equally likely, or in proportion to `shares`."""
    if shares is None:
        return options[int(rng.integers(len(options)))]
    return options[int(rng.choice(len(options), p=shares))]
