"""Small pieces the UNet is made of."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn


def timestep_embedding(
    timesteps: Float[Tensor, " b"] | Tensor, dim: int, max_period: float = 10000.0
) -> Float[Tensor, "b dim"]:
    """Sinusoidal embedding of the time steps: `dim / 2` cosines, then as many sines, in float32.

    Frequencies fall geometrically from 1 to `1 / max_period` (Vaswani et al., section 3.5).
    """
    half = dim // 2
    # In this order: a rounding of the frequency is multiplied by up to a thousand steps.
    exponents = -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps[:, None].float() * torch.exp(exponents)
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return nn.functional.pad(embedding, (0, dim % 2))


def zero_module(module: nn.Module) -> nn.Module:
    """The module with all its parameters at zero, so that a residual branch starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
