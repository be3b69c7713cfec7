"""Embeddings of words, to start an identifier from or to prompt with: another word's, or a textual
inversion's.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.modules.encoders import tokenizer

log = logging.getLogger(__name__)

ANY_WORD = "*"  # the word in files whose vectors have no name of their own
# The widths of the text encoders that people train embeddings for.
WIDTHS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 1280: "Stable Diffusion XL"}


@dataclass(frozen=True)
class Embedding:
    """Vectors that stand for a word, from a textual-inversion file (Gal et al., 2208.01618).

    Args:
        words: every word that means it in a prompt, the first one first.
        vectors: one for each token that it takes in a prompt.
        source: where it is from, for reports.
        own_word: the word that the file itself gives it, None if it gives none.
    """

    words: tuple[str, ...]
    vectors: Float[Tensor, "n d"]
    source: str
    own_word: str | None = None


def token_of(word: str) -> int:
    """Return the id of a word that is a single token.

    Raises:
        UserError: it is several, or none.
    """
    ids = tokenizer.encode(word)
    if len(ids) != 1:
        raise UserError(
            f"'{word}' is {len(ids)} tokens, not one: choose a word that the vocabulary has"
        )
    return ids[0]


def in_vocabulary(word: str) -> bool:
    """Return whether a word is a single token, so that the vocabulary has a row for it."""
    return len(tokenizer.encode(word)) == 1


class EmbeddingManager:
    """Write rows of the text encoder's token embedding, or add some.

    The reference configs name this class; there it trained embeddings of placeholders. DreamBooth
    trains the whole text encoder instead, so what is left is to choose where a placeholder starts.

    Args:
        embedder: a text encoder with a `token_embedding` and `added_words`.
    """

    def __init__(self, embedder: Any = None):
        self.embedder = embedder

    @property
    def _rows(self) -> nn.Parameter:
        return self.embedder.token_embedding.weight

    @torch.no_grad()
    def initialize(self, init_word: str, placeholder: str) -> None:
        """Give `placeholder` the embedding of `init_word` (the mean, if that is several tokens)."""
        ids = tokenizer.encode(init_word)
        if not ids:
            raise UserError("--init_word: an empty word has no embedding")
        self._rows[token_of(placeholder)] = self._rows[ids].mean(dim=0)

    @torch.no_grad()
    def load(self, embeddings: Sequence[Embedding]) -> list[str]:
        """Make words of prompts mean these embeddings, and return the words.

        A single vector of a word that the vocabulary has is written over that word's row. For other
        words the vectors become new rows, and the text encoder's `tokenize` finds the words in
        prompts. So it does for signs such as "*", which with a sign beside them would be another
        token.

        Raises:
            UserError: vectors that do not fit this text encoder; then nothing is written.
        """
        for embedding in embeddings:
            self._check(embedding)
        for embedding in embeddings:
            is_single = len(embedding.vectors) == 1
            in_rows = [
                word
                for word in embedding.words
                if is_single and word.isalnum() and in_vocabulary(word)
            ]
            for word in in_rows:
                self._rows[token_of(word)] = embedding.vectors[0].to(self._rows)
            self._add_words(
                [word for word in embedding.words if word not in in_rows], embedding.vectors
            )
            report(embedding)
        return [word for embedding in embeddings for word in embedding.words]

    @torch.no_grad()
    def start_from(self, embeddings: Sequence[Embedding], identifier: str) -> list[str]:
        """Write embeddings over rows of the vocabulary, for a training that starts from them;
        return the rows' words.

        An embedding goes to its own word, if that is a single token, and otherwise to the
        identifier: a new row would be lost, because a checkpoint has the vocabulary's rows alone.

        Raises:
            UserError: vectors that do not fit, several for one word, or several embeddings for the
                identifier; then nothing is written.
        """
        rows: dict[str, Tensor] = {}
        for embedding in embeddings:
            self._check(embedding)
            own = embedding.own_word
            word = own if own is not None and in_vocabulary(own) else identifier
            if len(embedding.vectors) > 1 or word in rows:
                raise UserError(
                    f"{embedding.source}: several vectors for '{word}', which has one: a training "
                    "starts from a file "
                    "of one vector; such embeddings are for sampling"
                )
            token_of(word)  # raises if the identifier is several tokens
            rows[word] = embedding.vectors[0]
        for word, vector in rows.items():
            self._rows[token_of(word)] = vector.to(self._rows)
        return list(rows)

    def _check(self, embedding: Embedding) -> None:
        """Raise a `UserError` if vectors do not fit the text encoder."""
        count, width = embedding.vectors.shape
        expected = self._rows.shape[1]
        name = embedding.words[0]
        if width != expected:
            kinds = [
                f"{known} is {kind}" for known, kind in WIDTHS.items() if known in (width, expected)
            ]
            hint = f" ({', '.join(kinds)})" if kinds else ""
            raise UserError(
                f"{embedding.source}: '{name}' has vectors of width {width}, "
                f"this model's text encoder needs {expected}{hint}"
            )
        longest = self.embedder.max_length - 2  # a prompt has a start and an end
        if count > longest:
            raise UserError(
                f"{embedding.source}: '{name}' has {count} vectors, a prompt has room for {longest}"
            )
        if not embedding.vectors.isfinite().all():
            raise UserError(f"{embedding.source}: '{name}' has values that are not finite")

    def _add_words(self, words: Sequence[str], vectors: Float[Tensor, "n d"]) -> None:
        """Give the vectors rows of their own, which the words stand for."""
        if not words:
            return
        table = self.embedder.token_embedding
        ids = list(range(table.num_embeddings, table.num_embeddings + len(vectors)))
        rows = torch.cat([table.weight, vectors.to(table.weight)])
        table.weight = nn.Parameter(rows, requires_grad=table.weight.requires_grad)
        table.num_embeddings += len(vectors)
        self.embedder.added_words = {
            **self.embedder.added_words,
            **{word.lower(): ids for word in words},
        }


def report(embedding: Embedding) -> None:
    """Log which words mean an embedding, and warn of those that meant something before."""
    words = " and ".join(f"'{word}'" for word in embedding.words)
    verb = "means" if len(embedding.words) == 1 else "mean"
    count = len(embedding.vectors)
    vectors = "vector" if count == 1 else f"{count} vectors"
    log.info("%s: in prompts, %s %s its %s", embedding.source, words, verb, vectors)
    for word in embedding.words:
        if word != ANY_WORD and in_vocabulary(word):
            log.warning(
                "%s: '%s' is a word of the vocabulary: in prompts it no longer has its "
                "own meaning; "
                "give the file another name to have both", embedding.source, word,
            )  # fmt: skip
