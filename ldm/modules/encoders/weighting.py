r"""Prompts in the syntax of AUTOMATIC1111's web UI: weighted words, and texts of any length.

    (w)  ((w))     the words in it count 1.1 and 1.1 x 1.1 times
    (w:1.3)        1.3 times
    [w]            1 / 1.1 times
    \( \) \[ \]    the bracket itself
    BREAK          begin a new chunk

A chunk is as much as the text encoder reads at once: 75 tokens. A longer prompt is cut into
several, after a comma if one is near the end. The UNet reads the embeddings of all chunks one after
another.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from ldm.errors import UserError
from ldm.modules.encoders.modules import TextEncoder
from ldm.modules.encoders.tokenizer import END, START, encode, groups_with

A1111 = "a1111"
WEIGHTINGS = (A1111,)  # what `--weighting` accepts

FACTORS = {")": 1.1, "]": 1 / 1.1}  # what a bracket that closes does to the words in it
NEAR = 20  # tokens that may move to the next chunk, so that it begins after a comma

SYNTAX = re.compile(
    r"""
    \\ (?P<literal> [()\[\]\\]? )
    | (?P<opens> [(\[] )
    | : \s* (?P<weight> [+-]? [.\d]+ ) \s* \)
    | (?P<closes> [)\]] )
    | (?P<text> [^\\()\[\]:]+ | : )
    """,
    re.VERBOSE,
)
BREAK = re.compile(r"\s*\bBREAK\b\s*")

# What the web UI would read as something else than words, and this module does not know.
UNKNOWN = {
    "prompt editing": r"(?<!\\)\[[^\[\]]*:\s*[.\d]+\s*\]",
    "alternating words": r"(?<!\\)\[[^\[\]]*\|[^\[\]]*\]",
    "composed prompts": r"\bAND\b",
    "an extra network": r"<(?:lora|lyco|hypernet):[^>]*>",
}


@dataclass
class Piece:
    """Words of one weight, or the mark of a break."""

    text: str
    weight: float = 1.0
    is_break: bool = False


@dataclass
class Chunk:
    """Token ids without start and end, and the weight of each."""

    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    def cut(self, at: int) -> Chunk:
        """Take what follows the first `at` tokens out of the chunk, and return it."""
        rest = Chunk(self.ids[at:], self.weights[at:])
        del self.ids[at:], self.weights[at:]
        return rest


# From a prompt to pieces


def parse(prompt: str) -> list[list[Piece]]:
    """Return the weighted pieces of a prompt, in a list for each part between breaks.

    A bracket that is not closed reaches to the end. One that closes nothing stands for itself.

    Raises:
        UserError: a weight that is no number, or syntax of the web UI that is not read here.
    """
    for what, pattern in UNKNOWN.items():
        if found := re.search(pattern, prompt):
            raise UserError(
                f"prompt: '{found[0]}' is {what} in the web UI's syntax, which is not supported: "
                "take it out, or leave --weighting out"
            )
    pieces = _weighted(prompt)
    parts: list[list[Piece]] = [[]]
    for piece in pieces:
        if piece.is_break:
            parts.append([])
        # Neighbours of one weight are one text: "(un)(known)" is a word.
        elif parts[-1] and parts[-1][-1].weight == piece.weight:
            parts[-1][-1].text += piece.text
        else:
            parts[-1].append(piece)
    return parts


def _weighted(prompt: str) -> list[Piece]:
    """Return the pieces of a prompt in order, with the weights of all brackets around each."""
    pieces: list[Piece] = []
    # For each kind of bracket, how many pieces there were when it opened.
    opened: dict[str, list[int]] = {")": [], "]": []}

    def weigh(first: int, factor: float) -> None:
        for piece in pieces[first:]:
            piece.weight *= factor

    for match in SYNTAX.finditer(prompt):
        token = match[0]
        closes = ")" if match["weight"] else match["closes"]
        if match["literal"] is not None:
            pieces.append(Piece(match["literal"]))
        elif match["opens"]:
            opened[")" if token == "(" else "]"].append(len(pieces))
        elif closes and opened[closes]:
            factor = _number(match["weight"]) if match["weight"] else FACTORS[closes]
            weigh(opened[closes].pop(), factor)
        else:
            first, *others = BREAK.split(token)
            pieces.append(Piece(first))
            for text in others:
                pieces += [Piece("", is_break=True), Piece(text)]
    for closes, places in opened.items():
        for place in places:
            weigh(place, FACTORS[closes])
    return pieces


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise UserError(
            f"prompt: the weight ':{text})' is no number; write '\\)' for the bracket itself"
        ) from error


# From pieces to chunks


def chunks_of(
    prompt: str, room: int, groups_of: Callable[[str], list[list[int]]] | None = None
) -> list[Chunk]:
    """Return the chunks of a prompt, at least one, each of at most `room` tokens.

    Args:
        groups_of: gives the token ids of a text, in groups that stay in one chunk.
    """
    groups_of = groups_of or (lambda text: groups_with(text, {}))
    chunks: list[Chunk] = []
    parts = parse(prompt)
    for number, part in enumerate(parts):
        filled = _fill(part, room, groups_of)
        # A break at the very end begins nothing.
        ends_empty = number > 0 and number == len(parts) - 1 and not filled[0].ids
        chunks += [] if ends_empty else filled
    return chunks


def reads_differently(prompt: str, room: int = 75) -> bool:
    """Return whether a prompt in this syntax is something else than its plain words.

    Raises:
        UserError: as `parse` does.
    """
    ids = encode(prompt)
    return chunks_of(prompt, room) != [Chunk(ids, [1.0] * len(ids))]


def _fill(
    part: Sequence[Piece], room: int, groups_of: Callable[[str], list[list[int]]]
) -> list[Chunk]:
    """Return the chunks of the text between two breaks."""
    (comma,) = encode(",")
    chunks = [Chunk()]
    for piece in part:
        for group in groups_of(piece.text):
            if len(group) > room:
                raise UserError(f"prompt: a word of {len(group)} vectors; a chunk has {room}")
            if len(chunks[-1].ids) + len(group) > room:
                full = chunks[-1]
                # The words after a comma near the end are better read with what follows.
                recent = full.ids[-NEAR:]
                moved = recent[::-1].index(comma) if comma in recent and group != [comma] else 0
                chunks.append(full.cut(len(full.ids) - moved))
            chunks[-1].ids += group
            chunks[-1].weights += [piece.weight] * len(group)
    return chunks


# From chunks to embeddings


class WeightedText:
    """Reads prompts in the web UI's syntax with a text encoder."""

    def __init__(self, encoder: TextEncoder):
        self.encoder = encoder

    def __call__(self, prompts: Sequence[str]) -> Float[Tensor, "b n d"]:
        """Return embeddings of prompts, all of the length that the longest one needs.

        A prompt is encoded alone, so that its embedding does not depend on the others.
        """
        embedded = {prompt: self.embed(prompt) for prompt in dict.fromkeys(prompts)}
        # Attention to a text that is repeated is attention to the text. So shorter ones become as
        # long as the others and stay the same to the UNet.
        length = math.lcm(*[len(one) for one in embedded.values()])
        return torch.stack([embedded[p].repeat(length // len(embedded[p]), 1) for p in prompts])

    def embed(self, prompt: str) -> Float[Tensor, "n d"]:
        """Return the embeddings of a prompt's chunks, one after another."""
        encoder = self.encoder
        added = encoder.all_added_words()
        chunks = chunks_of(prompt, encoder.max_length - 2, lambda text: groups_with(text, added))
        tokens = torch.full((len(chunks), encoder.max_length), encoder.pad, dtype=torch.int64)
        weights = torch.ones(len(chunks), encoder.max_length)
        for row, weight, chunk in zip(tokens, weights, chunks):
            ids = [START, *chunk.ids, END]
            row[: len(ids)] = torch.tensor(ids)
            weight[1 : len(ids) - 1] = torch.tensor(chunk.weights)
        return emphasised(encoder.embed(tokens), weights).flatten(0, 1)


def emphasised(
    embeddings: Float[Tensor, "b n d"], weights: Float[Tensor, "b n"]
) -> Float[Tensor, "b n d"]:
    """Return embeddings times the weights of their tokens, with the mean that they had before.

    The mean is that of a chunk. Restoring it is the web UI's choice, which keeps pictures of large
    weights from falling apart.
    """
    weighted = embeddings * weights[..., None].to(embeddings)
    means, before = (x.mean((1, 2), keepdim=True) for x in (weighted, embeddings))
    # Where nothing is weighted, nothing may change, whatever the mean is.
    changed = (weights != 1).any(1)[:, None, None].to(embeddings.device)
    return torch.where(changed, weighted * (before / means), embeddings)
