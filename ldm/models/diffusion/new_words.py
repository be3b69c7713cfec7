"""New words in a model's captions: learned alone (Textual Inversion), or tuned around."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm.errors import ParameterError
from ldm.modules.embedding_manager import EmbeddingManager
from ldm.modules.encoders.modules import TextEncoder
from ldm.util import instantiate_from_config

NAME = "personalization_config"  # the parameter of `LatentDiffusion`


def learns_words_alone(config: Mapping[str, Any] | None) -> bool:
    """Return whether a `personalization_config` asks for a training of new words and no more."""
    return config is not None and not (config.get("params") or {}).get("pivotal", False)


def check_words_alone(given: Mapping[str, Any]) -> None:
    """Raise a `UserError` for what belongs to a training of the model's own weights.

    Args:
        given: values of `LatentDiffusion`'s parameters that would have no effect; empty ones are
            left out.
    """
    for key, value in given.items():
        if value:
            raise ParameterError(
                key,
                f"{NAME} trains new words alone: leave {key} out, or set {NAME}.params.pivotal: "
                "true to train the model around them",
            )


def new_words(config: Mapping[str, object], encoder: TextEncoder) -> EmbeddingManager:
    """Return the new words that a config names, which the text encoder reads from now on.

    Raises:
        UserError: there are none, or they cannot be words.
    """
    # From here on the encoder reads the new rows behind its table.
    manager = instantiate_from_config(config, NAME, embedder=encoder)
    if not isinstance(manager, EmbeddingManager) or not manager.words:
        raise ParameterError(
            f"{NAME}.params.placeholder_strings", 'no new word: give one, such as ["*"]'
        )
    # Pivotal tuning: the words were learned before, and the model is trained around them.
    if manager.pivotal:
        manager.requires_grad_(False)
    return manager
