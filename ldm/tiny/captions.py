"""Captions in the phrasing of DreamBooth's prompts: "a photo of a striped red dog facing left in
the snow".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ldm.tiny.styles import ALIASES

PLURAL = {"glasses", "sunglasses"}
MASS = {"pixel art"}  # styles that take no article
PHOTO = (
    ("a photo of {}", 0.45),
    ("photo of {}", 0.15),
    ("{}", 0.30),
    ("a picture of {}", 0.05),
    ("an image of {}", 0.05),
)
STYLED = (
    ("{style} of {thing}", 0.45),
    ("a painting of {thing} in the style of {style}", 0.30),
    ("{thing} in the style of {style}", 0.15),
    ("{thing}, {style}", 0.10),
)
# How a caption says a view: a phrase around the thing, and the words after it.
VIEWED = {
    "facing left": (("{}", "facing left"),),
    "facing right": (("{}", "facing right"),),
    "from behind": (("{}", "from behind"), ("{}", "seen from the back"), ("a back view of {}", "")),
    "from above": (("{}", "from above"), ("{}", "seen from the top"), ("a top view of {}", "")),
    "close-up": (("a close-up of {}", ""), ("a close-up photo of {}", "")),
    "far away": (("{}", "far away"), ("{}", "in the distance")),
}


@dataclass(frozen=True)
class Words:
    """What a caption says of a picture. What it leaves out is ""."""

    class_word: str
    scene: str = ""
    colour: str = ""
    material: str = ""
    accessory: str = ""
    view: str = ""
    style: str = ""


def with_article(noun: str) -> str:
    """Return a noun with its article: "a dog", "an owl", "a unicorn". A plural has none."""
    if noun.split()[-1] in PLURAL:
        return noun
    vowel = noun[0] in "aeiou" and not noun.startswith("uni")
    return f"{'an' if vowel else 'a'} {noun}"


def compose_caption(rng: np.random.Generator, words: Words) -> str:
    """Say the words in one of several phrasings."""
    adjectives = [word for word in (words.material, words.colour) if word]
    thing = with_article(" ".join([*adjectives, words.class_word]))

    # The thing is followed by what it wears and by the view. Some views come before the thing.
    ways = VIEWED[words.view] if words.view else (("{}", ""),)
    if words.style and words.view:
        # "a close-up photo" would not go with "a watercolor painting": the view comes after.
        ways = tuple(way for way in ways if way[1])
    phrase, view = pick(rng, ways)
    thing = joined(thing, words.accessory, view)
    if words.style:
        return style_phrase(rng, words.style, joined(thing, words.scene))
    if phrase == "{}":
        phrase = chosen(rng, PHOTO)
    return joined(phrase.format(thing), words.scene)


def joined(*parts: str) -> str:
    """Join phrases with spaces; leave out the empty ones."""
    return " ".join(part for part in parts if part)


def prompt_with(kind: str, word: str, noun: str) -> str:
    """Return a prompt that asks for a word of a kind: "photo of a golden sks dog"."""
    thing = with_article(noun)
    if kind == "style":
        return f"{word if word in MASS else with_article(word)} of {thing}"
    if kind == "material":
        return f"photo of {with_article(f'{word} {noun}')}"
    if word == "close-up":
        return f"a close-up photo of {thing}"
    return f"photo of {thing} {word}"


def style_phrase(rng: np.random.Generator, style: str, thing: str) -> str:
    """Say that a thing is shown in a style, under one of the style's names."""
    name = pick(rng, ALIASES[style])
    noun = name if name in MASS else with_article(name)
    return chosen(rng, STYLED).format(style=noun, thing=thing)


def chosen(rng: np.random.Generator, phrases: Sequence[tuple[str, float]]) -> str:
    """Choose a phrase by its share."""
    texts, shares = zip(*phrases)
    return texts[rng.choice(len(texts), p=shares)]


def pick(rng: np.random.Generator, options: Sequence):
    """Choose one of the options, all equally likely."""
    return options[int(rng.integers(len(options)))]
