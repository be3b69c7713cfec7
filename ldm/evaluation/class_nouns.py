"""Which class word photos ask for: zero-shot CLIP (Radford et al., 2103.00020) over nouns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.errors import UserError

TEMPLATE = "a photo of a {}"
TIMES = 5.0  # a noun so many times as likely as the given word makes that doubtful

# A kind, and what is one of it. The kinds are nouns, too: "toy" is no wrong word for a robot toy.
NOUNS: Mapping[str, tuple[str, ...]] = {
    "person": ("man", "woman", "boy", "girl", "baby", "face"),
    "animal": (
        *("dog", "cat", "rabbit", "horse", "cow", "sheep", "pig", "goat", "bird", "owl", "duck"),
        *("chicken", "penguin", "parrot", "fish", "turtle", "frog", "snake", "lizard", "bear"),
        *("panda", "fox", "wolf", "lion", "tiger", "elephant", "monkey", "mouse", "hamster"),
        *("squirrel", "butterfly"),
    ),
    "toy": ("stuffed animal", "doll", "robot", "toy car", "figurine", "action figure"),
    "vehicle": ("car", "bus", "truck", "motorcycle", "bicycle", "train", "boat", "airplane"),
    "clothes": (
        *("shirt", "dress", "jacket", "hat", "cap", "scarf", "sneaker", "boot", "shoe", "sock"),
        *("glasses", "sunglasses", "watch", "ring", "necklace"),
    ),
    "bag": ("backpack", "handbag", "suitcase", "purse"),
    "container": ("bowl", "can", "cup", "mug", "bottle", "vase", "teapot", "box", "jar", "basket"),
    "furniture": ("chair", "table", "sofa", "bed", "lamp", "shelf", "desk", "cupboard"),
    "instrument": ("guitar", "violin", "piano", "drum", "trumpet"),
    "device": ("clock", "camera", "phone", "laptop", "keyboard", "radio", "television"),
    "plant": ("flower", "tree", "cactus", "potted plant", "mushroom"),
    "food": ("cake", "bread", "pizza", "fruit", "apple", "sandwich"),
    "building": ("house", "church", "castle", "tower", "bridge"),
    "art": ("painting", "drawing", "sculpture", "statue", "logo"),
    "thing": ("book", "candle", "ball", "umbrella", "knife", "pen", "key", "coin", "mask"),
}


def all_nouns() -> list[str]:
    """Return the kinds and their nouns."""
    return [*NOUNS, *(noun for members in NOUNS.values() for noun in members)]


@dataclass(frozen=True)
class Suggestion:
    """The class words that fit photos, the likeliest first, with their shares.

    Args:
        given: the word that was given; None where none was.
    """

    shares: Mapping[str, float]
    given: str | None = None

    @property
    def best(self) -> str:
        """Return the likeliest noun."""
        return next(iter(self.shares))

    @property
    def is_doubtful(self) -> bool:
        """Tell whether another noun is far likelier than the given word.

        A kind is not wrong for one of it, nor is one of it for a kind ("animal", "dog"), nor a word
        that has the noun in it ("corgi dog").
        """
        if self.given is None or self.given == self.best:
            return False
        best, given = self.best, self.given.lower()
        related = given in NOUNS.get(best, ()) or best in NOUNS.get(given, ())
        if related or best in given.split() or given in best.split():
            return False
        return self.shares[best] > TIMES * self.shares[self.given]

    def line(self, shown: int = 3) -> str:
        """Say which nouns fit, and whether the given word does, in one line."""
        listed = ", ".join(
            f"{noun} {share:.0%}" for noun, share in list(self.shares.items())[:shown]
        )
        if self.given is None:
            return f"the photos look like: {listed}; --class_word '{self.best}'"
        own = f"'{self.given}' {self.shares[self.given]:.0%}"
        if self.is_doubtful:
            return f"{own} looks wrong; the photos look like: {listed}"
        return f"{own} fits; the photos look like: {listed}"


@dataclass(frozen=True)
class ImageText:
    """A CLIP's two towers.

    Args:
        images, texts: give pictures and texts features, one row each, in one space.
        scale: its factor before the softmax; OpenAI's have 100.
        nouns: those that it knows; None for one that has read the web.
    """

    images: Callable[[Sequence[Image.Image]], Tensor]
    texts: Callable[[Sequence[str]], Tensor]
    scale: float = 100.0
    nouns: Sequence[str] | None = None


def suggest(
    photos: Sequence[Image.Image],
    clip: ImageText,
    given: str | None = None,
    nouns: Sequence[str] | None = None,
) -> Suggestion:
    """Return the nouns by how well CLIP finds them to fit the photos, taken together.

    Args:
        given: a class word to compare with them.
        nouns: instead of those that the CLIP knows.

    Raises:
        UserError: a noun has no letters.
    """
    if any(not noun.strip() for noun in nouns or ()):
        raise UserError("--nouns: one of them is empty")
    words = list(dict.fromkeys(nouns or clip.nouns or all_nouns()))
    if given and given not in words:
        words.append(given)
    images = F.normalize(clip.images(photos).float(), dim=-1)
    texts = F.normalize(clip.texts([TEMPLATE.format(word) for word in words]).float(), dim=-1)
    shares = (clip.scale * images @ texts.T).softmax(-1).mean(0).tolist()
    order = sorted(zip(words, shares), key=lambda pair: -pair[1])
    return Suggestion(dict(order), given or None)
