"""Conditioning: how text (and, for inpainting, extra latent channels) reaches the UNet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import ParameterError
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.util import instantiate_from_config

# A tensor, a list of tensors, or {"c_concat": [...], "c_crossattn": [...]}.
Cond = Tensor | Sequence[Tensor | None] | Mapping[str, Tensor | Sequence[Tensor | None] | None]

# Which parts of a conditioning a model reads: the others are ignored, as LDM's are.
CONDITIONING_KEYS: dict[str, tuple[str, ...]] = {
    "crossattn": ("c_crossattn",),
    "concat": ("c_concat",),
    "hybrid": ("c_concat", "c_crossattn"),
    "hybrid-adm": ("c_concat", "c_crossattn", "c_adm"),
}

# What a UNet reads beside the noisy latent and the text, by the names above: further input channels
# (c_concat), and a class or a noise level (c_adm).
Beside = Mapping[str, Tensor]


def with_beside(text: Tensor, beside: Beside | None) -> Cond:
    """Return the conditioning of a text and of what the UNet reads beside it, if anything."""
    if beside is None:
        return text
    return {**{name: [value] for name, value in beside.items()}, "c_crossattn": [text]}


def as_mapping(cond: Cond | None, conditioning_key: str) -> dict[str, list[Tensor]]:
    """Return the dict form of a conditioning, with what a model of this key reads and no more.

    Bare tensors go where the key says; None is no conditioning, also as an entry.
    """
    read = CONDITIONING_KEYS[conditioning_key]
    if not isinstance(cond, Mapping):
        # A hybrid model's bare tensors are its text.
        cond = {"c_crossattn" if "c_crossattn" in read else read[0]: cond}
    # From here on there is one form, whichever a script or a web UI passed.
    parts = {name: tensors(cond.get(name)) for name in read}
    # Without these channels the UNet's first convolution would fail, with an error about shapes.
    for name in ("c_concat", "c_adm"):
        if name in read and not parts[name]:
            raise ValueError(f"conditioning: a model of key {conditioning_key} needs {name}")
    return {name: part for name, part in parts.items() if part}


def tensors(cond: object) -> list[Tensor]:
    """Return the tensors of a conditioning of any form, in its order."""
    if cond is None:
        return []
    if isinstance(cond, Tensor):
        return [cond]
    if isinstance(cond, str) or not isinstance(cond, (Mapping, Sequence)):
        raise ValueError(f"conditioning: expected tensors, got {cond!r}")
    # A conditioning may be nested: a dict of lists is the usual case.
    parts = cond.values() if isinstance(cond, Mapping) else cond
    return [tensor for part in parts for tensor in tensors(part)]


def concat_batches(first: Cond | None, second: Cond | None) -> Any:
    """Return one conditioning for both batches, in that order; the two must have the same form."""
    # Guidance runs two conditionings in one pass of the UNet. Only equal forms can be joined entry
    # by entry.
    if first is None and second is None:
        return None
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.cat([first, second])
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        # What one lacks has to be empty in the other.
        keys = dict.fromkeys([*first, *second])
        return {key: concat_batches(first.get(key), second.get(key)) for key in keys}
    if isinstance(first, Sequence) and isinstance(second, Sequence) and len(first) == len(second):
        return [concat_batches(*pair) for pair in zip(first, second)]
    names = " and ".join(_form(cond) for cond in (first, second))
    raise ValueError(f"conditionings differ in form: {names}")


def _form(cond: object) -> str:
    length = f" of {len(cond)}" if isinstance(cond, Sequence) else ""
    return f"{type(cond).__name__}{length}"


def batch_size(cond: Cond | None) -> int | None:
    """Return how many samples a conditioning is for; None if it holds no tensor."""
    # Every tensor of a conditioning has the batch as its first dimension, so one is enough.
    found = tensors(cond)
    return len(found[0]) if found else None


class DiffusionWrapper(nn.Module):
    """Routes `c_concat` to the UNet's input channels, `c_crossattn` to its cross-attention, and
    `c_adm` to its embedding of classes.
    """

    def __init__(self, unet_config: Mapping[str, object], conditioning_key: str):
        super().__init__()
        if conditioning_key not in CONDITIONING_KEYS:
            accepted = ", ".join(CONDITIONING_KEYS)
            problem = f"unknown '{conditioning_key}'; accepted: {accepted}"
            raise ParameterError("conditioning_key", problem)
        self.diffusion_model = instantiate_from_config(unet_config, "unet_config")
        self.conditioning_key = conditioning_key

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        c_concat: list[Tensor] | None = None,
        c_crossattn: list[Tensor] | None = None,
        c_adm: list[Tensor] | None = None,
    ) -> Tensor:
        # Inpainting models read the mask and the masked latent beside the noisy one, those that
        # upscale the small image.
        inputs = torch.cat([x, *c_concat], dim=1) if c_concat else x
        # Several texts are one longer text. A single one stays the same tensor from step to step,
        # so that its keys and values can be kept (`texts_read_once`).
        context = None
        if c_crossattn:
            context = c_crossattn[0] if len(c_crossattn) == 1 else torch.cat(c_crossattn, dim=1)
        # A network that was put into half precision computes in it; autocast sees to that itself.
        dtype = x.dtype
        if not torch.is_autocast_enabled(x.device.type):
            unet = self.diffusion_model
            inputs = inputs.to(unet.dtype if isinstance(unet, UNetModel) else dtype)
            context = context if context is None else context.to(inputs.dtype)
        more = {} if c_adm is None else {"y": c_adm[0]}
        return self.diffusion_model(inputs, t, context=context, **more).to(dtype)
