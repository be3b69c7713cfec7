"""What is computed for each sample of a batch: its error, what a mask leaves of it, offset noise.

`Objective` in `ldm/models/diffusion/objective.py` puts these together: the prior's weight, the
weights of time steps and all other settings of the loss are there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ldm.errors import ParameterError
from ldm.rng import SampleRandom, derive_seed

PIXEL_LOSSES: dict[str, Callable[..., Tensor]] = {"l1": F.l1_loss, "l2": F.mse_loss}


def pixel_loss(name: str) -> Callable[..., Tensor]:
    """Return the error of single elements; raise a `UserError` for a name that is not known."""
    if name not in PIXEL_LOSSES:
        raise ParameterError("loss_type", f"unknown '{name}'; accepted: {', '.join(PIXEL_LOSSES)}")
    return PIXEL_LOSSES[name]


def per_sample_loss(
    output: Float[Tensor, "b c h w"],
    target: Float[Tensor, "b c h w"],
    loss_type: str = "l2",
    weights: Float[Tensor, "b h w"] | None = None,
) -> Float[Tensor, " b"]:
    """Return the mean error of each sample, in float32 whatever the autocast.

    Args:
        loss_type: l2 or l1.
        weights: of places, for a weighted mean. A sample whose weights are all 0 has the loss 0.
    """
    error = pixel_loss(loss_type)(output.float(), target.float(), reduction="none")
    if weights is None:
        return error.mean(dim=(1, 2, 3))
    weights = weights.float()
    total = weights.mean(dim=(1, 2))
    # Divided by the weights' sum: half as much area does not halve the loss.
    weighted = (error * weights[:, None]).mean(dim=(1, 2, 3))
    return weighted / torch.where(total > 0, total, 1.0)


def place_weights(
    masks: Sequence[Float[Tensor, "_ _ _"] | None],
    latents: Sequence[Float[Tensor, "_ _ _ _"]],
    floor: float = 0.0,
) -> Float[Tensor, "b h w"] | None:
    """Return how much each place of a batch's latents counts; None if no part has masks.

    Args:
        masks: of each part, in [0, 1], at the size of its images or of its latents; None where all
            counts.
        latents: of each part, or anything of their shape.
        floor: the weight where a mask is 0.
    """
    if all(mask is None for mask in masks):
        return None
    parts = []
    for mask, latent in zip(masks, latents):
        height, width = latent.shape[2:]
        share = latent.new_ones((len(latent), height, width))
        if mask is not None:
            # A place of the latent counts as much as the pixels that it stands for do on average.
            share = F.adaptive_avg_pool2d(mask.to(latent)[:, None], (height, width))[:, 0]
        parts.append(floor + (1 - floor) * share)
    return torch.cat(parts)


def with_offset(
    noise: Float[Tensor, "b c h w"], strength: float, seeds: Sequence[int] | Tensor | None
) -> Float[Tensor, "b c h w"]:
    """Add a random constant to each sample and channel, so that a latent's mean is learned, too.

    Offset noise (Guttenberg, 2023, https://www.crosslabs.org/blog/diffusion-with-offset-noise). The
    constants are a function of the samples' seeds, and drawn only if there is a `strength`.
    """
    if not strength:
        return noise
    own = None if seeds is None else [derive_seed("offset", int(seed)) for seed in seeds]
    constants = SampleRandom(own, noise.device).randn((*noise.shape[:2], 1, 1))
    return noise + strength * constants
