"""Other programs' names for the same tensors become ours: those of a CompVis checkpoint.

Trainers put a mapping around the weights (`state_dict`, `model`, `module`) and words into their
names (`module.`, `_orig_mod.`); older versions of transformers, and Stability's later code, named
the text encoder in other ways.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.errors import UserError

log = logging.getLogger(__name__)

State = dict[str, Tensor]

# What trainers call the mapping of weights in a file, the most telling first.
WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "weights", "params", "net")
# What wrappers of modules put into names: DDP, DeepSpeed and Fabric, torch.compile, FSDP,
# activation checkpointing, and a web UI's text encoder.
_WORDS = "module|_forward_module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|wrapped"
_LEADING = re.compile(rf"^(?:(?:{_WORDS})\.)+")
_INSIDE = re.compile(rf"(?<=\.)(?:{_WORDS})\.")

AVERAGES = "model_ema."  # how the names of a UNet's averaged weights begin
NEW_WORDS = "embedding_manager."  # of words beside the vocabulary
UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
NETWORKS = {"UNet": UNET, "autoencoder": VAE, "text encoder": TEXT}
OUTPUT = UNET + "out.2.weight"  # the UNet's last convolution
IMAGE_CHANNELS = 3
# transformers before 4.0 had no `text_model` level.
_OLD_CLIP = re.compile(
    r"^cond_stage_model\.transformer\.(?=(?:embeddings|encoder\.layers|final_layer_norm)\.)"
)
# Stability's generative-models calls the text encoder of Stable Diffusion 1 and 2 so; XL has a
# second one.
_SGM_TEXT, _SGM_SECOND = "conditioner.embedders.0.", "conditioner.embedders.1."


def unwrapped(content: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """Return what is inside the mappings that trainers put around the weights."""
    for _ in range(len(WRAPPERS)):
        inner = [
            content[name]
            for name in WRAPPERS
            if isinstance(content.get(name), Mapping) and content[name]
        ]
        if not inner:
            break
        content = inner[0]
    return content


def with_our_names(state: Mapping[str, Tensor], path: str | Path) -> State:
    """Return a model's tensors under our names; names that are not known stay as they are.

    Raises:
        UserError: two tensors come to one name.
    """
    bare = {key: _LEADING.sub("", key) for key in state}
    outer = _outer_prefix(bare.values(), path)
    bare = {key: name.removeprefix(outer) for key, name in bare.items()}
    has_second_text_encoder = any(name.startswith(_SGM_SECOND) for name in bare.values())

    # The names of averaged weights are those of the weights without dots, so they follow the same
    # changes.
    ours: dict[str, str] = {}
    averages: dict[str, str] = {}
    for key, name in bare.items():
        new = _our_name(name, has_second_text_encoder)
        ours[key] = new
        if new.startswith("model."):
            averages[ema_name(name)] = averages[ema_name(new)] = ema_name(new)
    for key, name in bare.items():
        if name.startswith(AVERAGES):
            average = name.removeprefix(AVERAGES)
            ours[key] = AVERAGES + averages.get(average, average)

    _refuse_collisions(ours, path)
    return {ours[key]: _repaired(ours[key], value, path) for key, value in state.items()}


def absent_networks(state: Mapping[str, Tensor]) -> list[str]:
    """Return the names of a model's networks that are not there.

    A model in pixels needs no autoencoder.
    """
    absent = [
        name
        for name, prefix in NETWORKS.items()
        if not any(key.startswith(prefix) for key in state)
    ]
    if works_in_pixels(state):
        absent.remove("autoencoder")
    return absent


def works_in_pixels(state: Mapping[str, Tensor]) -> bool:
    """Return whether a UNet predicts images, which have three channels, and not latents."""
    has_autoencoder = any(key.startswith(VAE) for key in state)
    predicts_image = OUTPUT in state and len(state[OUTPUT]) == IMAGE_CHANNELS
    return predicts_image and not has_autoencoder


def ema_name(key: str) -> str:
    """Return the name that the average of a weight has behind `model_ema.`."""
    return key.removeprefix("model.").replace(".", "")


def _outer_prefix(names: Iterable[str], path: str | Path) -> str:
    """Return what stands before the networks' names, such as `model.` in
    `model.model.diffusion_model...`.

    Raises:
        UserError: two things stand there: which of the two models is meant?
    """
    names = list(names)
    if any(name.startswith(tuple(NETWORKS.values())) for name in names):
        return ""
    outer: dict[str, None] = {}
    for name, network in itertools.product(names, NETWORKS.values()):
        before, found, _ = name.partition("." + network)
        if found:
            outer[before + "."] = None
    if len(outer) > 1:
        both = " and ".join(f"'{prefix}'" for prefix in outer)
        raise UserError(
            f"{path}: it holds more than one model, under {both}: take the others out of the file"
        )
    return next(iter(outer), "")


def _our_name(name: str, has_second_text_encoder: bool) -> str:
    name = _INSIDE.sub("", name)
    if not has_second_text_encoder and name.startswith(_SGM_TEXT):
        name = TEXT + name.removeprefix(_SGM_TEXT)
    return _OLD_CLIP.sub("cond_stage_model.transformer.text_model.", name)


def _refuse_collisions(ours: Mapping[str, str], path: str | Path) -> None:
    seen: dict[str, str] = {}
    for key, name in ours.items():
        if name in seen:
            raise UserError(
                f"{path}: '{seen[name]}' and '{key}' are both '{name}': take one of them out of "
                "the file"
            )
        seen[name] = key


def _repaired(name: str, value: Tensor, path: str | Path) -> Tensor:
    """Return `position_ids` as the numbers from 0 that they always are.

    Files that were cast or averaged as a whole have them in half precision, and 38.99 would become
    38.
    """
    if not name.endswith("embeddings.position_ids") or value.ndim == 0:
        return value
    numbers = torch.arange(value.shape[-1]).expand(value.shape)
    if not torch.equal(value.double().round(), numbers.double()):
        log.warning("%s: its '%s' are not 0, 1, 2, ...: damaged, and built anew", path, name)
    return numbers.contiguous()
