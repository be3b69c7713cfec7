"""The CLIP tokenizer, from the vocabulary that open-clip-torch ships: nothing is downloaded."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

START, END = 49406, 49407


@functools.lru_cache(maxsize=1)
def _bpe():  # open_clip is imported late: it takes a second
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


def encode(text: str) -> list[int]:
    """The byte-pair ids of a text, without start and end."""
    return _bpe().encode(text)


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The vocabulary, word -> id, and the merges in their order."""
    bpe = _bpe()
    ranks = bpe.bpe_ranks
    return dict(bpe.encoder), sorted(ranks, key=ranks.__getitem__)


def tokenize(texts: Sequence[str], max_length: int = 77, pad: int = END) -> Int[Tensor, "b n"]:
    """Ids of each text: start, pieces, end, then padding (the end token again for SD v1, 0 for v2).

    Longer texts are cut so that the end token is the last one.
    """
    tokens = torch.full((len(texts), max_length), pad, dtype=torch.int64)
    for row, text in zip(tokens, texts):
        ids = [START, *encode(text)[: max_length - 2], END]
        row[: len(ids)] = torch.tensor(ids)
    return tokens
