"""What a weights file is: its tensors, the config of its model, what is known of its training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpoints.lora import adapted_layers, merge_adapters
from ldm.checkpoints.reading import state_dict_of
from ldm.config import load_config, to_plain
from ldm.errors import UserError
from ldm.modules.adapters import lora_options


def find_config(content: Mapping[str, Any], checkpoint: Path) -> dict[str, Any] | None:
    """The config that a checkpoint of ours carries, or that lies in its run folder; None for others."""
    if isinstance(config := content.get("config"), dict) and "model" in config:
        return config
    saved = sorted((checkpoint.resolve().parent.parent / "configs").glob("*-project.yaml"))
    config = to_plain(load_config(saved)) if saved else {}
    return config if "model" in config else None


def lora_alpha(content: Mapping[str, Any], checkpoint: Path, config: Mapping[str, Any] | None = None) -> float:
    """The scale of a LoRA run's adapters, as the checkpoint's own config says, or else `config`.

    Raises:
        UserError: neither of them does.
    """
    for model in ((known or {}).get("model") or {} for known in (find_config(content, checkpoint), config)):
        if (given := (model.get("params") or {}).get("lora")) is not None:
            return lora_options(given).alpha
    raise UserError(f"{checkpoint}: a LoRA run's checkpoint without the config that ran: give it with --config")


def plain_weights(
    content: Mapping[str, Any], checkpoint: Path, config: Mapping[str, Any] | None = None
) -> Mapping[str, Tensor]:
    """A checkpoint's named tensors for a model without adapters: those of a LoRA run are merged.

    Raises:
        UserError: there are none, or adapters whose scale no config says.
    """
    state = state_dict_of(content, checkpoint)
    return merge_adapters(state, lora_alpha(content, checkpoint, config)) if adapted_layers(state) else state
