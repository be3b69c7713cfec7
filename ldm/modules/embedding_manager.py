"""Embeddings of words: new ones that are learned (Textual Inversion; Gal et al., 2208.01618), and
others' to start an identifier from or to prompt with.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ldm.errors import ParameterError, UserError
from ldm.modules.encoders import tokenizer
from ldm.modules.encoders.new_rows import FIRST_NEW, ExtendedEmbedding
from ldm.modules.encoders.t5 import FrozenT5Embedder

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


class EmbeddingManager(nn.Module):
    """Give words that no vocabulary has rows of their own, which a training learns.

    A text encoder then finds the words in captions and prompts. Its table stays as it is. The names
    of the parameters and of the rows in a checkpoint are LDM's.

    Args:
        embedder: a text encoder with a `token_embedding` and `added_words`; None for none yet.
        placeholder_strings: the new words, such as "*".
        initializer_words: the word that each starts as; of several tokens, their mean counts.
        num_vectors_per_token: rows of each new word, all of which start alike.
        pivotal: leave the rows as they are, and train the model around them (pivotal tuning).

    Raises:
        UserError: a word that cannot be one, or a number out of range.
    """

    # A checkpoint from before the training has none of the rows.
    optional_keys = ("string_to_param_dict.",)

    def __init__(
        self,
        embedder: object = None,
        placeholder_strings: Sequence[str] | None = None,
        initializer_words: Sequence[str] | None = None,
        num_vectors_per_token: int = 1,
        pivotal: bool = False,
    ):
        super().__init__()
        words = _checked_words(placeholder_strings)
        starts = _checked_starts(initializer_words)
        if starts and len(starts) != len(words):
            problem = f"{len(starts)} for {len(words)} placeholder_strings: one each"
            raise ParameterError("initializer_words", problem)
        if num_vectors_per_token < 1:
            problem = f"expected 1 or more, got {num_vectors_per_token}"
            raise ParameterError("num_vectors_per_token", problem)
        self.initializer_words, self.pivotal = dict(zip(words, starts)), pivotal
        self.string_to_param_dict = nn.ParameterDict()
        if isinstance(embedder, FrozenT5Embedder):
            raise UserError("embeddings of words are for CLIP's text encoders: this model has a T5")
        # In a tuple, the encoder is no part of this module: it has keys of its own.
        self._embedder = (embedder,)
        if words and embedder is not None:
            self._extend(words, num_vectors_per_token)

    def _extend(self, words: Sequence[str], count: int) -> None:
        """Give each word so many rows, and let the encoder find them."""
        longest = self.embedder.max_length - 2  # a prompt has a start and an end
        if count > longest:
            problem = f"{count} vectors, a prompt has room for {longest}"
            raise ParameterError("num_vectors_per_token", problem)
        width, first = self._rows.shape[1], FIRST_NEW
        added = {}
        for word in words:
            self.string_to_param_dict[word] = nn.Parameter(torch.zeros(count, width))
            added[word.lower()] = list(range(first, first + count))
            first += count
        self.embedder.added_words = {**self.embedder.added_words, **added}
        table = self.embedder.token_embedding
        self.embedder.replace_token_embedding(ExtendedEmbedding(table, self._new_rows))

    def _new_rows(self) -> Float[Tensor, "n d"]:
        return torch.cat(list(self.string_to_param_dict.values()))

    @property
    def embedder(self) -> Any:
        """Return the text encoder."""
        return self._embedder[0]

    @property
    def words(self) -> dict[str, Tensor]:
        """Return the vectors of each new word, (n, d)."""
        return dict(self.string_to_param_dict.items())

    def words_in(self, text: str) -> list[str]:
        """Return which of the new words a text holds."""
        ids = set(tokenizer.encode_with(text, self.embedder.added_words))
        added = self.embedder.added_words
        return [word for word in self.words if ids & set(added[word.lower()])]

    @property
    def _rows(self) -> nn.Parameter:
        return self.embedder.token_embedding.weight

    # What new words start as

    @torch.no_grad()
    def start_as_words(self, known: Collection[str] = ()) -> str:
        """Give new words the embedding of their initializer words, and say so.

        Args:
            known: words that have their vectors already.

        Raises:
            UserError: a word that has neither.
        """
        said = []
        for word, rows in self.words.items():
            if word in known:
                said.append(f"'{word}' goes on as it is in the file")
                continue
            ids = tokenizer.encode(self.initializer_words.get(word, ""))
            if not ids:
                raise ParameterError(
                    "personalization_config.params.initializer_words",
                    f"'{word}' has no word to start as: give --init_word WORD, such as the class",
                )
            rows.copy_(self._rows[ids].mean(dim=0).expand_as(rows))
            said.append(f"'{word}' starts as '{self.initializer_words[word]}'")
        return "; ".join(said)

    @torch.no_grad()
    def start_as_embeddings(self, embeddings: Sequence[Embedding]) -> list[str]:
        """Give new words the vectors of a file, and return the words that have them now.

        An embedding goes to the word that it is of; a single one goes to a single word.

        Raises:
            UserError: vectors that do not fit, or that belong to no new word.
        """
        chosen: dict[str, Tensor] = {}
        for embedding in embeddings:
            self._check(embedding)
            fitting = [word for word in self.words if word in embedding.words]
            if not fitting and len(embeddings) == len(self.words) == 1:
                fitting = list(self.words)
            if not fitting:
                raise UserError(
                    f"{embedding.source}: '{embedding.words[0]}' is none of this model's new words "
                    f"({', '.join(self.words)}): name it in placeholder_strings"
                )
            for word in fitting:
                has, wanted = len(embedding.vectors), len(self.words[word])
                if has != wanted:
                    raise UserError(
                        f"{embedding.source}: {has} vectors, '{word}' has {wanted}: set "
                        f"personalization_config.params.num_vectors_per_token to {has}"
                    )
                chosen[word] = embedding.vectors
        for word, vectors in chosen.items():
            self.words[word].copy_(vectors)
        return list(chosen)

    def __str__(self) -> str:
        parts = []
        for word, rows in self.words.items():
            vectors = "1 vector" if len(rows) == 1 else f"{len(rows)} vectors"
            parts.append(f"'{word}' ({vectors} of {rows.shape[1]})")
        return ", ".join(parts)

    # Rows of words that there are, and rows for prompts alone

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


def _checked_words(words: Sequence[str] | None) -> list[str]:
    """Return placeholders as a list; raise a `UserError` for one that cannot be a word."""
    found: list[str] = []
    taken = nn.ParameterDict()  # the names of its own are no names for its parameters
    if isinstance(words, str):
        raise ParameterError("placeholder_strings", f"expected a list of words, got {words!r}")
    for word in words or ():
        # A parameter's name has no dot, and white space parts words.
        if not isinstance(word, str) or not word or "." in word or word.split() != [word]:
            problem = f"{word!r} is no word: letters, digits and signs, without spaces and dots"
            raise ParameterError("placeholder_strings", problem)
        if hasattr(taken, word):
            problem = f"{word!r} is a name that a parameter cannot have: choose <{word}>"
            raise ParameterError("placeholder_strings", problem)
        if word.lower() in (other.lower() for other in found):
            raise ParameterError("placeholder_strings", f"'{word}' is there twice, in any case")
        found.append(word)
    return found


def _checked_starts(words: Sequence[str] | None) -> list[str]:
    """Return the words to start as; raise a `UserError` for what is no list of words."""
    if isinstance(words, str) or not all(isinstance(word, str) for word in words or ()):
        raise ParameterError("initializer_words", f"expected a list of words, got {words!r}")
    return list(words or ())


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
