"""The CLIP tokenizer, from the vocabulary that open-clip-torch ships: nothing is downloaded."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

log = logging.getLogger(__name__)

START, END = 49406, 49407
VOCABULARY = 49408  # words in it

_known: set[tuple[str, int]] = set()  # texts whose length was looked at, with the length allowed


@functools.lru_cache(maxsize=1)
def _bpe():  # open_clip is imported late: it takes a second
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


def encode(text: str) -> list[int]:
    """Return the byte-pair ids of a text, without start and end."""
    return _bpe().encode(text)


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the vocabulary, word -> id, and the merges in their order."""
    bpe = _bpe()
    ranks = bpe.bpe_ranks
    return dict(bpe.encoder), sorted(ranks, key=ranks.__getitem__)


def encode_with(text: str, added: Mapping[str, Sequence[int]]) -> list[int]:
    """Return the ids of a text in which words that were added, in lower case, stand for the given
    ids.

    A word is found wherever it stands for itself: "my-dog" in "my-dog's toy", not in "my-dogs".
    """
    return [number for group in groups_with(text, added) for number in group]


def groups_with(text: str, added: Mapping[str, Sequence[int]]) -> list[list[int]]:
    """Return the ids of a text as `encode_with` does, in groups that must not be parted.

    The ids of a word that was added are one group; every other id is a group of its own.
    """
    if not added:
        return [[number] for number in encode(text)]
    # The longest first: of "my-dog" and "my-dog-2", the second is meant where both fit.
    patterns = []
    for word in sorted(added, key=len, reverse=True):
        before = r"(?<!\w)" if re.match(r"\w", word[0]) else ""
        after = r"(?!\w)" if re.match(r"\w", word[-1]) else ""
        patterns.append(before + re.escape(word) + after)
    groups: list[list[int]] = []
    for piece in re.split(f"({'|'.join(patterns)})", text, flags=re.IGNORECASE):
        own = added.get(piece.lower())
        groups += [list(own)] if own else [[number] for number in encode(piece)]
    return groups


def lost_text(
    text: str, max_length: int = 77, added: Mapping[str, Sequence[int]] | None = None
) -> str:
    """Return the end of a text that is cut off, as its tokens read; "" if all of the text fits.

    A word that was added is lost as a whole where some of its ids are.
    """
    words = {tuple(ids): word for word, ids in (added or {}).items()}
    length, parts, tokens = 0, [], []
    for group in groups_with(text, added or {}):
        length += len(group)
        if length <= max_length - 2:
            continue
        word = words.get(tuple(group))
        if word is None:
            tokens += [token for token in group if token < START]
        else:
            parts += [_bpe().decode(tokens), word]
            tokens = []
    parts.append(_bpe().decode(tokens))
    return " ".join(part.strip() for part in parts if part.strip())


def warn_of_cut(
    texts: Iterable[str],
    max_length: int = 77,
    added: Mapping[str, Sequence[int]] | None = None,
    shown: int = 3,
) -> None:
    """Warn of each text that is too long, once, with what of it is lost; of many, quote some."""
    new = [text for text in dict.fromkeys(texts) if (text, max_length) not in _known]
    _known.update((text, max_length) for text in new)
    cut = [text for text in new if lost_text(text, max_length, added)]
    for text in cut[:shown]:
        lost = lost_text(text, max_length, added)
        quoted = lost if len(lost) <= 160 else f"{lost[:70]} [...] {lost[-80:]}"
        log.warning(
            "a text of more than %d tokens is cut: of '%s...', this is not read: '%s'",
            *(max_length - 2, text[:40], quoted),
        )
    if len(cut) > shown:
        log.warning("%d more texts are cut after %d tokens", len(cut) - shown, max_length - 2)


def tokenize(
    texts: Sequence[str],
    max_length: int = 77,
    pad: int = END,
    added: Mapping[str, Sequence[int]] | None = None,
) -> Int[Tensor, "b n"]:
    """Return the ids of each text: start, pieces, end, padding (the end again for SD v1, 0 for v2).

    Longer texts are cut so that the end token is the last one, and warned of.

    Args:
        added: words beside the vocabulary's, in lower case, and the ids that each stands for.
    """
    warn_of_cut(texts, max_length, added)
    tokens = torch.full((len(texts), max_length), pad, dtype=torch.int64)
    for row, text in zip(tokens, texts):
        ids = [START, *encode_with(text, added or {})[: max_length - 2], END]
        row[: len(ids)] = torch.tensor(ids)
    return tokens


def transformers_tokenizer(max_length: int = 77, pad: int = END) -> Any:
    """Build transformers' `CLIPTokenizer` of the same vocabulary, whose ids are the same."""
    from transformers import CLIPTokenizer

    ids, merges = vocabulary()
    # open_clip has other names for the two special words than OpenAI's files.
    names = {START: "<|startoftext|>", END: "<|endoftext|>"}
    words = {names.get(number, word): number for word, number in ids.items()}
    fill = next(word for word, number in words.items() if number == pad)
    pairs: Any = merges  # annotated as strings, and taken as pairs, too
    return CLIPTokenizer(vocab=words, merges=pairs, pad_token=fill, model_max_length=max_length)
