"""Classifier-free guidance (Ho & Salimans 2022)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.models.diffusion.conditioning import Cond, concat_batches

Denoiser = Callable[[Tensor, Tensor], Tensor]


def guided(
    apply_model: Callable[[Tensor, Tensor, Cond], Tensor], cond: Cond, uncond: Cond | None, scale: float
) -> Denoiser:
    """`(x_t, t) -> output`, moved away from the unconditional output by `scale`, in float32.

    With scale 1 or no `uncond` the model runs on the conditional half alone.
    """
    if uncond is None or scale == 1.0:
        return lambda x, t: apply_model(x, t, cond).float()
    both = concat_batches(uncond, cond)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        # float32 from here on: under autocast the scale would magnify the output's rounding.
        output = apply_model(torch.cat([x, x]), torch.cat([t, t]), both).float()
        output_uncond, output_cond = output.chunk(2)
        return output_uncond + scale * (output_cond - output_uncond)

    return denoise
