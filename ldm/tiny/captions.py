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
# How a view is said: a phrase around the thing, and the words behind it.
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
    """What a caption says of a picture; "" for what it leaves out."""

    class_word: str
    scene: str = ""
    colour: str = ""
    material: str = ""
    accessory: str = ""
    view: str = ""
    style: str = ""


def with_article(noun: str) -> str:
    """Return "a dog", "an owl", "a unicorn"; a plural as it is."""
    if noun.split()[-1] in PLURAL:
        return noun
    vowel = noun[0] in "aeiou" and not noun.startswith("uni")
    return f"{'an' if vowel else 'a'} {noun}"


def compose_caption(rng: np.random.Generator, words: Words) -> str:
    """Say the words in one of several phrasings."""
    adjectives = [word for word in (words.material, words.colour) if word]
    thing = with_article(" ".join([*adjectives, words.class_word]))

    # What it wears and from where it is seen stand right behind the thing, or the view stands
    # before it.
    ways = VIEWED[words.view] if words.view else (("{}", ""),)
    if words.style:
        ways = tuple(way for way in ways if way[1] or not words.view)
    before, behind = pick(rng, ways)
    thing = " ".join(part for part in (thing, words.accessory, behind) if part)
    if words.style:
        scenic = " ".join(part for part in (thing, words.scene) if part)
        return style_phrase(rng, words.style, scenic)
    phrase = before if before != "{}" else chosen(rng, PHOTO)
    return " ".join(part for part in (phrase.format(thing), words.scene) if part)


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
    """Say that a thing is shown in a style, by one of the style's names."""
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
