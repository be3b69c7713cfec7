"""Classifier-free guidance (Ho & Salimans 2022)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ldm.models.diffusion.conditioning import Cond, concat_batches

Denoiser = Callable[[Tensor, Tensor], Tensor]


def guided(
    apply_model: Callable[[Tensor, Tensor, Any], Tensor],
    cond: Cond | None,
    uncond: Cond | None,
    scale: float,
) -> Denoiser:
    """Return `(x_t, t) -> output`, moved away from the unconditional output by `scale`, in float32.

    With scale 1 or no `uncond` the model runs on the conditioning alone.
    """
    # With scale 1, eq. 6 is the conditional output alone, and the unconditional one is not needed.
    if uncond is None or scale == 1.0:
        return lambda x, t: apply_model(x, t, cond).float()
    # Joined once here, not in every step.
    both = concat_batches(uncond, cond)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        # One pass of the model over both is faster than two. From here on in float32: under
        # autocast the scale would magnify the output's rounding.
        output = apply_model(torch.cat([x, x]), torch.cat([t, t]), both).float()
        output_uncond, output_cond = output.chunk(2)
        # Ho & Salimans, eq. 6, with scale = 1 + w. It is written for noise, and holds for x0 and v
        # as well: at a given x_t the noise is an affine function of each, and the weights of the
        # two outputs sum to 1.
        return output_uncond + scale * (output_cond - output_uncond)

    return denoise
