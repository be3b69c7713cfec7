"""Weights that a network names as its `ckpt_path`: it refuses to compute before they are loaded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ldm.errors import ParameterError


class NamedWeights:
    """Whether the file that a network names has been loaded.

    Constructors read no files. Who builds a network by `instantiate_from_config` alone, and does
    not load the file, would compute with random weights without a word.

    Args:
        network: whose weights are in the file.
        path: the file; with None nothing is refused.
        entrances: the parts of the network that are called first.
    """

    def __init__(self, network: nn.Module, path: str | None, entrances: Iterable[nn.Module]):
        self.path = path
        self.loaded = not path
        if self.loaded:
            return
        for entrance in entrances:
            entrance.register_forward_pre_hook(self._refuse)
        network.register_load_state_dict_post_hook(self._note)

    def _refuse(self, module: nn.Module, inputs: object) -> None:
        if not self.loaded:
            raise ParameterError(
                "ckpt_path",
                f"{self.path} is not loaded yet, so the weights are random: call "
                "ldm.checkpoints.parts.load_parts(model) once the model is built",
            )

    def _note(self, network: nn.Module, found: Any) -> None:
        """Take any of the network's weights for those that it waits for."""
        missing = tuple(found.missing_keys)
        ours = network.state_dict().keys()
        for name in ours:
            is_missing = any(key.endswith(name) for key in missing)
            if not is_missing:
                self.loaded = True
