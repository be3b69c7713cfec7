"""What the demo asks of a subject: the paper's applications, in words that the miniature knows.

Words that it has not learned well are left out. `docs/results.md` says how often it shows each.
This file also says which class words the miniature knows: it has seen 24 kinds of things.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ldm.config import load_config, to_plain
from ldm.tiny.captions import prompt_with
from ldm.tiny.miniature import ROOT

LDM_CONFIG = ROOT / "configs/tiny/ldm.yaml"
# What people call things, and the world's word for it.
SAME = {
    "automobile": "car",
    "bag": "backpack",
    "bunny": "rabbit",
    "cup": "bowl",
    "hound": "dog",
    "kitten": "cat",
    "kitty": "cat",
    "mug": "bowl",
    "plushie": "stuffed animal",
    "pot": "teapot",
    "puppy": "dog",
    "rucksack": "backpack",
    "shoe": "sneaker",
    "spectacles": "glasses",
    "sunglasses": "glasses",
    "teddy": "stuffed animal",
    "tin": "can",
    "trainer": "sneaker",
}
STYLES = (
    "pencil sketch",
    "watercolor painting",
    "stained glass window",
    "pixel art",
    "woodblock print",
    "oil painting",
)
VIEWS = ("close-up", "far away")
PROPERTIES = ("red", "purple", "golden", "silver", "stone", "spotted")
ACCESSORIES = (
    "wearing a red hat",
    "wearing a santa hat",
    "wearing a black top hat",
    "wearing a purple wizard hat",
)
# What has a head to wear things on. Sprites say it themselves, but they do not ship.
WITH_A_HEAD = {
    "bear", "cat", "dog", "fox", "owl", "panda", "penguin", "rabbit", "robot", "stuffed animal",
    "toy",
}  # fmt: skip


def known_classes() -> list[str]:
    """Return the class words that the miniature was trained with, in alphabetical order."""
    train = to_plain(load_config([LDM_CONFIG]))["data"]["params"]["train"]["params"]
    return sorted(train["dataset"]["params"]["classes"])


def world_word(class_word: str) -> tuple[str, str]:
    """Return the world's word for a class word, and one line for the user.

    The line is "" where the word is known. A word that is neither known nor another name of a
    known thing stays as it is.
    """
    known = known_classes()
    if class_word in known:
        return class_word, ""
    plain = class_word.strip().lower()
    if plain in known or plain in SAME:
        word = SAME.get(plain, plain)
        return word, f"the miniature calls a {class_word} '{word}', so '{word}' is the class word"
    return class_word, (
        f"the miniature has never seen a '{class_word}': expect other shapes. "
        f"It knows {', '.join(known)}"
    )


def applications(class_word: str) -> Mapping[str, Mapping[str, str]]:
    """Return the rows of the demo's sheet: title -> caption -> prompt of the subject.

    Scenes are not among them. What has no head wears nothing.
    """
    noun = f"sks {class_word}"
    asked: dict[str, tuple[str, Sequence[str]]] = {
        "art renditions": ("style", STYLES),
        "views": ("view", VIEWS),
        "other properties": ("material", PROPERTIES),
    }
    if class_word in WITH_A_HEAD:
        asked["accessories"] = ("accessory", ACCESSORIES)
    return {
        title: {word: prompt_with(kind, word, noun) for word in words}
        for title, (kind, words) in asked.items()
    }
