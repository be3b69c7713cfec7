"""Styles, materials, views and accessories: how often the miniature shows what is asked for.

The judges are linear classifiers of renderings, as for classes and scenes (`ldm.tiny.measure`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor

from ldm.evaluation.metrics import (
    Encoder,
    Recognizer,
    accuracy,
    features_of,
    gap_closed,
    middle,
    similarity,
    similarity_within,
    to_tensor,
)
from ldm.rng import generator
from ldm.tiny.accessories import ACCESSORIES
from ldm.tiny.captions import prompt_with
from ldm.tiny.materials import MATERIALS, PATTERNS
from ldm.tiny.measure import SIZE, Draw, Reconstruct, accuracy_by, renderings
from ldm.tiny.styles import STYLES
from ldm.tiny.views import VIEWS
from ldm.tiny.world import World

# Kind -> its words. A judge can also answer "", which means none of them.
KINDS: dict[str, list[str]] = {
    "style": list(STYLES),
    "material": [*MATERIALS, *PATTERNS],
    "view": list(VIEWS),
    "accessory": list(ACCESSORIES),
}
FITTED_TO = 6000  # renderings that the judges learn from
OF_EACH_WORD = 120  # renderings among them, at least, that show each word
SEARCHED = 20  # pictures that are looked at, at most, for each one that is taken
CEILING = 3000  # renderings that the judges are tried on
PER_WORD = 8  # samples for each word


def make_attribute_judge(encoder: Encoder) -> Recognizer:
    """Make a recognizer of styles, materials, views and accessories that has not been fitted."""
    return Recognizer([encoder], {kind: ["", *words] for kind, words in KINDS.items()})


def fit_attribute_judge(
    judge: Recognizer,
    train: World,
    reconstruct: Reconstruct,
    count: int = FITTED_TO,
    each: int = OF_EACH_WORD,
) -> None:
    """Fit a judge to `count` renderings of the whole world, half of them through the decoder.

    Few pictures show a bow tie. Those that do are searched for, until there are `each` of every
    word.
    """
    images, found = renderings(train, with_each_word(train, count, each), "attributes")
    images[::2] = features_of(reconstruct, images[::2]).clamp(-1, 1)
    targets = {
        kind: torch.tensor([labels.index(value) for value in found[kind]])
        for kind, labels in judge.labels.items()
    }
    judge.fit(judge.features(images), targets)


def with_each_word(world: World, count: int, each: int) -> list[int]:
    """Return the numbers of `count` pictures, of which `each` or more show every word.

    The first pictures that show a word are taken, then the first of the others. A word has fewer
    where it is rare or absent among the first `SEARCHED` x `count` pictures.
    """
    # How many pictures of each word are still to be found.
    lacking = {(kind, word): each for kind, words in KINDS.items() for word in words}
    chosen: list[int] = []
    for number in range(SEARCHED * count):
        if len(chosen) == count or not any(lacking.values()):
            break
        shown = world.describe(generator("attributes", number))
        words = [(kind, getattr(shown, kind)) for kind in KINDS if getattr(shown, kind)]
        if any(lacking[word] for word in words):
            chosen.append(number)
            for word in words:
                lacking[word] = max(0, lacking[word] - 1)

    # Fill up with the first pictures of any content.
    taken = set(chosen)
    others = (number for number in range(SEARCHED * count) if number not in taken)
    return sorted([*chosen, *islice(others, count - len(chosen))])


def classes_by_word(world: World, tries: int = 3000) -> dict[tuple[str, str], list[str]]:
    """Return (kind, word) -> the classes that the world shows with it, among `tries` pictures.

    Not every class goes with every word: a teapot has no side that looks left, and wears no hat.
    """
    classes: dict[tuple[str, str], list[str]] = {}
    for number in range(tries):
        seen = world.describe(generator("words", number))
        for kind in KINDS:
            shown = classes.setdefault((kind, getattr(seen, kind)), [])
            if seen.class_word not in shown:
                shown.append(seen.class_word)
    return classes


def measure_attributes(
    draw: Draw, judge: Recognizer, train: World, test: World, ceiling: int = CEILING
) -> dict[str, Any]:
    """Measure how often each kind is recognised in samples, and in renderings of unseen designs.

    Returns:
        "style", "style, unseen designs" and "by style" (word -> share), and so for each kind.
    """
    images, labels = renderings(test, ceiling, "ceiling of attributes")
    features = judge.features(images)
    classes = classes_by_word(train)
    measured: dict[str, Any] = {}
    for kind, words in KINDS.items():
        wanted = [word for word in words for _ in range(PER_WORD)]
        prompts = [
            prompt_with(kind, word, noun)
            for word in words
            for noun in islice(cycle(classes[kind, word]), PER_WORD)
        ]
        found = _recognised(judge, to_tensor(draw(prompts), SIZE), kind)
        measured[kind] = accuracy(found, wanted)
        measured[f"by {kind}"] = accuracy_by(wanted, found)

        # The ceiling: what the judge finds in renderings that show what such a prompt asks for:
        # something of this kind, and nothing of another.
        shown = [number for number, word in enumerate(labels[kind]) if word]
        for other in KINDS.keys() - {kind}:
            shown = [number for number in shown if not labels[other][number]]
        answers = judge.recognise(features[shown], kind)
        true_words = [labels[kind][number] for number in shown]
        measured[f"{kind}, unseen designs"] = accuracy(answers, true_words)
    return measured


def measure_applications(
    base: Draw,
    tuned: Draw,
    photos: Tensor,
    class_word: str,
    judge: Recognizer,
    encoders: Mapping[str, Encoder],
    words: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """Measure a subject in every style, material, view and accessory.

    Args:
        base, tuned: draw with the model before and after.
        photos: (n, 3, h, w) in [-1, 1].
        words: kind -> what is asked for; None for all of the world's.

    Returns:
        For each kind, such as "style":
        "style": share of the subject's pictures in which the judge finds what was asked for.
        "style, base": the same for the class's pictures by the base model.
        "style, NAME gap closed": the encoder NAME's measure of how like the photos the subject is.
        0 is the likeness of the class's pictures for the same prompts, 1 that of the photos among
        each other.
    """
    measured: dict[str, Any] = {}
    for kind, asked in (words or KINDS).items():
        wanted = [word for word in asked for _ in range(PER_WORD // 2)]
        after = _asked(tuned, kind, wanted, f"sks {class_word}")
        before = _asked(base, kind, wanted, class_word)
        measured[kind] = accuracy(_recognised(judge, after, kind), wanted)
        measured[f"{kind}, base"] = accuracy(_recognised(judge, before, kind), wanted)
        for name, encoder in encoders.items():
            real = features_of(encoder, middle(photos))
            reached = similarity(features_of(encoder, middle(after)), real)
            start = similarity(features_of(encoder, middle(before)), real)
            closed = gap_closed(reached, start, similarity_within(real))
            measured[f"{kind}, {name} gap closed"] = closed
    return measured


def _asked(draw: Draw, kind: str, wanted: Sequence[str], noun: str) -> Tensor:
    """Draw a noun with each word; return the pictures (n, 3, size, size)."""
    return to_tensor(draw([prompt_with(kind, word, noun) for word in wanted]), SIZE)


def _recognised(judge: Recognizer, images: Tensor, kind: str) -> list[str]:
    """Return the most likely word of each picture."""
    return judge.recognise(judge.features(images), kind)
