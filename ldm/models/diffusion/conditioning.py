"""Conditioning: how text (and, for inpainting, extra latent channels) reaches the UNet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import ParameterError
from ldm.util import instantiate_from_config

# A tensor, a list of tensors, or {"c_concat": [...], "c_crossattn": [...]}.
Cond = Tensor | Sequence[Tensor] | Mapping[str, Sequence[Tensor]]
CONDITIONING_KEYS = ("crossattn", "concat", "hybrid")


def as_mapping(cond: Cond, conditioning_key: str) -> dict[str, list[Tensor]]:
    """The dict form of a conditioning; bare tensors go where `conditioning_key` says."""
    key = "c_concat" if conditioning_key == "concat" else "c_crossattn"
    if isinstance(cond, Mapping):
        return dict(zip(cond, map(list, cond.values())))
    return {key: [cond] if isinstance(cond, Tensor) else list(cond)}


def concat_batches(first: Cond, second: Cond) -> Any:
    """One conditioning for both batches, in that order; the two must have the same form."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.cat([first, second])
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return {key: concat_batches(first[key], second[key]) for key in first}
    if isinstance(first, Sequence) and isinstance(second, Sequence):
        return [torch.cat(pair) for pair in zip(first, second)]
    raise ValueError(f"conditionings differ in form: {type(first).__name__} and {type(second).__name__}")


def batch_size(cond: Cond) -> int:
    """How many samples a conditioning is for."""
    if isinstance(cond, Tensor):
        return len(cond)
    parts: Sequence[Any] = list(cond.values()) if isinstance(cond, Mapping) else cond
    return batch_size(parts[0])


class DiffusionWrapper(nn.Module):
    """Routes `c_concat` to the UNet's input channels and `c_crossattn` to its cross-attention."""

    def __init__(self, unet_config: Mapping[str, Any], conditioning_key: str):
        super().__init__()
        if conditioning_key not in CONDITIONING_KEYS:
            accepted = ", ".join(CONDITIONING_KEYS)
            raise ParameterError("conditioning_key", f"unknown '{conditioning_key}'; accepted: {accepted}")
        self.diffusion_model = instantiate_from_config(unet_config, "unet_config")
        self.conditioning_key = conditioning_key

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        c_concat: list[Tensor] | None = None,
        c_crossattn: list[Tensor] | None = None,
    ) -> Tensor:
        x = torch.cat([x, *c_concat], dim=1) if c_concat else x
        context = torch.cat(c_crossattn, dim=1) if c_crossattn else None
        return self.diffusion_model(x, t, context=context)
