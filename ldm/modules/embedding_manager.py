"""Embeddings of single tokens, to start an identifier from: another word's, or a textual inversion's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoints.reading import read_checkpoint
from ldm.checkpoints.unpickle import Stub
from ldm.errors import UserError
from ldm.modules.encoders import tokenizer


def token_of(word: str) -> int:
    """The id of a word that is a single token.

    Raises:
        UserError: it is several, or none.
    """
    ids = tokenizer.encode(word)
    if len(ids) != 1:
        raise UserError(f"'{word}' is {len(ids)} tokens, not one: choose a word that the vocabulary has")
    return ids[0]


class EmbeddingManager:
    """Writes rows of the text encoder's token embedding.

    The reference configs name this class; there it trained embeddings of placeholders. DreamBooth trains
    the whole text encoder instead, so what is left is to choose where a placeholder starts.

    Args:
        embedder: a text encoder with a `token_embedding`.
        placeholder_strings, initializer_words, per_image_tokens, num_vectors_per_token, progressive_words:
            accepted for older configs, without effect.
    """

    def __init__(
        self,
        embedder: Any = None,
        placeholder_strings: Sequence[str] | None = None,
        initializer_words: Sequence[str] | None = None,
        per_image_tokens: bool = False,
        num_vectors_per_token: int = 1,
        progressive_words: bool = False,
    ):
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
    def load(self, path: str | Path) -> list[str]:
        """Write the embeddings of a textual-inversion file to their words, which it returns.

        Reads the layouts of CompVis (`string_to_param`) and of diffusers (word -> vector).

        Raises:
            UserError: no such file, no embedding in it, or one of another width or of several vectors.
        """
        vectors = _vectors(read_checkpoint(path))
        if not vectors:
            raise UserError(f"{path}: no textual-inversion embedding in it")
        for word, vector in vectors.items():
            vector = vector.reshape(-1, vector.shape[-1])
            if vector.shape != (1, self._rows.shape[1]):
                raise UserError(
                    f"{path}: '{word}' has {len(vector)} vectors of width {vector.shape[1]}, "
                    f"expected one of {self._rows.shape[1]}"
                )
            self._rows[token_of(word)] = vector[0].to(self._rows.dtype)
        return list(vectors)


def _vectors(content: dict[str, Any]) -> dict[str, Tensor]:
    named = content.get("string_to_param", content)
    if isinstance(named, Stub):  # a pickled ParameterDict
        state = named.state if isinstance(named.state, dict) else {}
        named = state.get("_parameters") or state
    named = named if isinstance(named, Mapping) else {}
    return {str(word): vector for word, vector in named.items() if isinstance(vector, Tensor) and vector.ndim}
