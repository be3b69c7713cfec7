"""The short pieces of a tokenizer's vocabulary: CLIP's, or one in a file of the user's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ldm.errors import UserError
from ldm.modules.encoders import tokenizer
from ldm.modules.encoders.t5 import open_words

LONGEST = 3  # characters of a piece, as in the paper
# The paper takes tokens 5000 to 10000 of T5's 32000, which are ordered by how frequent they are.
T5_SIZE, T5_WINDOW = 32_000, (5_000, 10_000)
CLIP_BYTES = 512  # entries of CLIP's vocabulary before its merges: each byte, alone and at an end
WORD_END, WORD_START = "</w>", "▁"
BYTE_START = "Ġ"  # a space before a word, in vocabularies of bytes


@dataclass(frozen=True)
class Piece:
    """An entry of a vocabulary: its id, how many are more frequent, and its characters."""

    token: int
    rank: int
    text: str


@dataclass(frozen=True)
class Vocabulary:
    """The pieces of at most three characters, by where they may stand in a word.

    Args:
        alone, first, middle, last: the pieces that are a word, begin, go on with or end one.
        encode: from a word to its ids.
        window: the ranks that the paper's window of T5 is here.
        size: the number of ranks.
    """

    name: str
    alone: tuple[Piece, ...]
    first: tuple[Piece, ...]
    middle: tuple[Piece, ...]
    last: tuple[Piece, ...]
    encode: Callable[[str], list[int]]
    window: tuple[int, int]
    size: int

    def rank(self, token: int) -> int:
        """Return the rank of a token of this vocabulary; CLIP's bytes come before all merges."""
        return max(0, token - CLIP_BYTES) if self.name == CLIP_NAME else token


CLIP_NAME = "CLIP"


def shared_window(size: int) -> tuple[int, int]:
    """Return the ranks that are the same shares of `size` as the paper's window is of T5's."""
    low, high = (size * end // T5_SIZE for end in T5_WINDOW)
    return low, high


def clip_vocabulary() -> Vocabulary:
    """Return CLIP's vocabulary.

    Its entries stand in the order in which they were merged, the most frequent pair first, so the
    rank of a word is the number of its last merge. T5's window of 5000 to 10000 of 32000 is at the
    same shares of CLIP's 48894 merges: 7639 to 15279. `sks` is merge 47624, among the rarest.
    """
    ids, merges = tokenizer.vocabulary()
    ends: list[Piece] = []
    others: list[Piece] = []
    for word, token in ids.items():
        if not CLIP_BYTES <= token < tokenizer.START:
            continue
        kind = ends if word.endswith(WORD_END) else others
        text = word.removesuffix(WORD_END)
        if is_short(text):
            kind.append(Piece(token, token - CLIP_BYTES, text))
    closing, open_ = tuple(ends), tuple(others)
    window = shared_window(len(merges))
    encode = tokenizer.encode
    return Vocabulary(CLIP_NAME, closing, open_, open_, closing, encode, window, len(merges))


def is_short(text: str) -> bool:
    """Tell whether a piece may be in an identifier: one to three lower-case letters or digits, at
    least one of them a letter.
    """
    is_plain = text.isascii() and text.isalnum() and text == text.lower()
    return is_plain and len(text) <= LONGEST and not text.isdigit()


def read_vocabulary(path: Path) -> Vocabulary:
    """Return the vocabulary of a SentencePiece file (T5's `spiece.model`) or a `tokenizer.json`.

    Raises:
        UserError: a file that is neither, or whose pieces do not say where words begin or end.
    """
    if not path.is_file():
        raise UserError(f"--vocabulary {path}: no such file")
    try:
        read = open_words(path)
    except Exception as error:  # each of the libraries has errors of its own
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"--vocabulary {path}: no SentencePiece file and no tokenizer.json: {line[:120]}"
        ) from error

    words = read.get_vocab(with_added_tokens=False)
    starts = {word[:1] for word in words} & {WORD_START, BYTE_START}
    begins = {word: word[1:] for word in words if word[:1] in starts and len(word) > 1}
    # The words of a prompt have a space before them, which is one of their bytes.
    space = " " if starts == {BYTE_START} else ""

    def encode(word: str) -> list[int]:
        return list(read.encode(space + word, add_special_tokens=False).ids)

    ends = {word: word.removesuffix(WORD_END) for word in words if word.endswith(WORD_END)}
    if not begins and not ends:
        raise UserError(
            f"--vocabulary {path}: its pieces do not say where a word begins or ends "
            f"({WORD_START}, {BYTE_START} or {WORD_END})"
        )
    marked = begins or ends
    pieces = [_pieces(words, marked)]
    pieces.append(_pieces(words, {word: word for word in words if word not in marked}))
    window = T5_WINDOW if begins and T5_SIZE <= len(words) < 33_000 else shared_window(len(words))
    whole, part = pieces
    places = (whole, whole, part, part) if begins else (whole, part, part, whole)
    return Vocabulary(path.name, *places, encode, window, len(words))


def _pieces(words: dict[str, int], texts: dict[str, str]) -> tuple[Piece, ...]:
    found = [
        Piece(words[word], words[word], text) for word, text in texts.items() if is_short(text)
    ]
    return tuple(sorted(found, key=lambda piece: piece.token))
