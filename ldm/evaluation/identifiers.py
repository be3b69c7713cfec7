"""Words for a subject: the paper's search for rare tokens (Ruiz et al., 2208.12242, section 3.2),
and what a model knows of each.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm.data.prompts import captions_from_templates
from ldm.errors import UserError
from ldm.evaluation.intervals import Estimate, estimate
from ldm.evaluation.vocabularies import LONGEST, Piece, Vocabulary
from ldm.sampling.text_to_image import Recipe, image_seed, text_to_image

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion

DEFAULT = "sks"
ALONE = "photo of a {identifier}"  # what the model draws for a word that nothing stands beside
TRIES = 300  # sequences tried for each candidate that is wanted

Draw = Callable[[Sequence[str], Sequence[int]], Sequence[Image.Image]]
Encode = Callable[[Sequence[Image.Image]], Tensor]


@dataclass(frozen=True)
class Identifier:
    """A word, its ids, and how many entries of the vocabulary are more frequent than each."""

    word: str
    tokens: tuple[int, ...]
    ranks: tuple[int, ...]


# The search in the vocabulary


def find_identifiers(
    vocabulary: Vocabulary,
    count: int,
    screened: Iterable[str],
    lengths: Sequence[int] = (1,),
    window: tuple[int, int] | None = None,
    seed: int = 0,
) -> list[Identifier]:
    """Return `count` words of rare tokens, drawn evenly and without replacement, as the paper does.

    A word is one to three tokens of at most three characters. It is decoded from its tokens, and
    encodes to them again: else a prompt would not reach them.

    Args:
        screened: words that no identifier may be a part of, or have as a part.
        lengths: how many tokens a word may have.
        window: the ranks to draw from, the second one excluded.

    Raises:
        UserError: there are not so many.
    """
    low, high = window or vocabulary.window
    chance = random.Random(seed)
    taken, found = set(screened), dict[str, Identifier]()
    draws = [_drawn(vocabulary, length, (low, high), chance) for length in lengths]
    for _ in range(TRIES * count):
        if len(found) == count or not draws:
            break
        draw = chance.choice(draws)
        pieces = next(draw, None)
        if pieces is None:  # all of this length have come
            draws.remove(draw)
            continue
        word, tokens = "".join(p.text for p in pieces), tuple(p.token for p in pieces)
        if word in found or is_screened(word, taken) or vocabulary.encode(word) != list(tokens):
            continue
        found[word] = Identifier(word, tokens, tuple(p.rank for p in pieces))
    if len(found) < count:
        raise UserError(
            f"only {len(found)} of {count} identifiers found among the ranks {low} to {high} of "
            f"{vocabulary.name}'s {vocabulary.size}: give other --ranks, --tokens or fewer "
            "--candidates"
        )
    return list(found.values())


def _drawn(
    vocabulary: Vocabulary, length: int, window: tuple[int, int], chance: random.Random
) -> Iterator[list[Piece]]:
    """Yield sequences of pieces of the window in random order; single pieces come once."""
    places = {
        1: [vocabulary.alone],
        2: [vocabulary.first, vocabulary.last],
        3: [vocabulary.first, vocabulary.middle, vocabulary.last],
    }[length]
    inside = [[p for p in place if window[0] <= p.rank < window[1]] for place in places]
    if length == 1:
        chance.shuffle(inside[0])
        yield from ([piece] for piece in inside[0])
        return
    while all(inside):
        yield [chance.choice(place) for place in inside]


def identifier_of(vocabulary: Vocabulary, word: str) -> Identifier:
    """Return a given word with its tokens and their ranks."""
    tokens = tuple(vocabulary.encode(word))
    return Identifier(word, tokens, tuple(map(vocabulary.rank, tokens)))


def words_of(*texts: str) -> set[str]:
    """Return the words of texts, in lower case."""
    return {word for text in texts for word in re.findall(r"[^\W_]+", text.lower())}


def is_screened(word: str, words: Iterable[str]) -> bool:
    """Tell whether an identifier would read as one of some words: as it, a part of it, or with it
    as a part.

    Words of one or two letters, such as "a" and "of", count only where they are the identifier.
    """
    return any(
        word == other or (len(other) >= LONGEST and (word in other or other in word))
        for other in words
    )


# What a model knows of a word


@dataclass(frozen=True)
class Known:
    """How much a model knows of a word, from pictures of it; each value belongs to one noise.

    Args:
        concentration: the mean cosine of the picture of "photo of a sks" with the others of it,
            less that of "photo of a". A word that means a thing draws pictures of one thing.
        pull: 1 less the cosine of the picture of "photo of a sks dog" and the one of "photo of a
            dog" from the same noise. A word that means nothing leaves the class as it is.
    """

    concentration: Float[Tensor, " n"]
    pull: Float[Tensor, " n"]

    @property
    def leak(self) -> Float[Tensor, " n"]:
        """Return the sum of both: how much of what the model knew would be in the subject."""
        return self.concentration + self.pull

    def against(self, other: Known) -> Estimate:
        """Return the difference of the leak to another word's, over the noises that they share,
        with its 95 % interval.
        """
        return estimate({"": (self.leak - other.leak).tolist()})


def known_of(
    words: Sequence[str], class_word: str, template: str, count: int, draw: Draw, encode: Encode
) -> Mapping[str, Known]:
    """Return what a model knows of each word, from `count` pictures of it alone and with the class.

    Args:
        template: of the prompt with the class.
        draw: makes a picture of each prompt from the noise of its number.
        encode: gives pictures features, a row each.
    """
    noises = list(range(count))
    (of_class,) = captions_from_templates(class_word, "", template)
    nothing = _row(ALONE.format(identifier=""), noises, draw, encode)
    plain = _row(of_class, noises, draw, encode)
    found = {}
    for word in tqdm(words, "identifiers", disable=None, leave=False):
        (prompt,) = captions_from_templates(class_word, word, template)
        alone = _row(ALONE.format(identifier=word), noises, draw, encode)
        with_class = _row(prompt, noises, draw, encode)
        concentration = _likeness(alone) - _likeness(nothing).mean()
        found[word] = Known(concentration, 1 - (with_class * plain).sum(-1))
    return found


def drawing(
    model: LatentDiffusion, recipe: Recipe, precision: str = "full", batch_size: int = 8
) -> Draw:
    """Return what draws prompts with a model: one noise a number, whatever the prompt."""

    def draw(prompts: Sequence[str], noises: Sequence[int]) -> list[Image.Image]:
        pictures: list[Image.Image] = []
        for start in range(0, len(prompts), batch_size):
            part = slice(start, start + batch_size)
            seeds = [image_seed(recipe.seed, noise) for noise in noises[part]]
            pictures += text_to_image(model, prompts[part], seeds, recipe, precision=precision)
        return pictures

    return draw


def _row(prompt: str, noises: Sequence[int], draw: Draw, encode: Encode) -> Tensor:
    text = " ".join(prompt.split())  # an identifier that is left out leaves two spaces
    pictures = draw([text] * len(noises), noises)
    return F.normalize(encode(pictures).float(), dim=-1)


def _likeness(rows: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Return the mean cosine of each row with the others."""
    n = len(rows)
    cosines = rows @ rows.T
    return (cosines.sum(1) - torch.diagonal(cosines)) / (n - 1)


# The table


def table(
    found: Sequence[Identifier],
    known: Mapping[str, Known] | None = None,
    default: str = DEFAULT,
) -> str:
    """Return a table in Markdown: the words that a model knows least of come first; the default is
    among them.
    """
    if known is None:
        lines = ["| identifier | tokens | ranks |", "|---|---|---|"]
        return "\n".join([*lines, *(f"| {_cells(each)} |" for each in found)])
    lines = [
        f"| identifier | tokens | ranks | concentration | pull | leak | leak less {default}'s |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in sorted(found, key=lambda each: float(known[each.word].leak.mean())):
        what = known[each.word]
        means = [f"{float(v.mean()):.3f}" for v in (what.concentration, what.pull, what.leak)]
        is_default = each.word == default
        difference = "the default" if is_default else str(what.against(known[default]))
        lines.append(f"| {_cells(each)} | {' | '.join([*means, difference])} |")
    return "\n".join(lines)


def _cells(each: Identifier) -> str:
    return f"{each.word} | {' '.join(map(str, each.tokens))} | {' '.join(map(str, each.ranks))}"
