"""The training objective: one number for each sample, and how subject and prior become one loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ldm.errors import ParameterError
from ldm.rng import SampleRandom, derive_seed

PIXEL_LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss}


def per_sample_loss(
    output: Float[Tensor, "b c h w"],
    target: Float[Tensor, "b c h w"],
    loss_type: str = "l2",
    weights: Float[Tensor, "b h w"] | None = None,
) -> Float[Tensor, " b"]:
    """Mean error of each sample, in float32 whatever the autocast; with `weights` of places their weighted mean.

    A sample whose weights are all 0 has the loss 0.
    """
    if loss_type not in PIXEL_LOSSES:
        raise ParameterError("loss_type", f"unknown '{loss_type}'; accepted: {', '.join(PIXEL_LOSSES)}")
    error = PIXEL_LOSSES[loss_type](output.float(), target.float(), reduction="none")
    if weights is None:
        return error.mean(dim=(1, 2, 3))
    total = weights.float().mean(dim=(1, 2))
    return (error * weights.float()[:, None]).mean(dim=(1, 2, 3)) / torch.where(total > 0, total, 1.0)


def place_weights(
    masks: Sequence[Float[Tensor, "_ _ _"] | None], latents: Sequence[Float[Tensor, "_ _ _ _"]], floor: float = 0.0
) -> Float[Tensor, "b h w"] | None:
    """How much each place of the latents of several halves counts; None if no half has masks.

    Args:
        masks: of each half, in [0, 1], at the size of its images or of its latents; None where all counts.
        latents: of each half, or anything of their shape.
        floor: the weight where a mask is 0.
    """
    if all(mask is None for mask in masks):
        return None
    parts = []
    for mask, latent in zip(masks, latents):
        height, width = latent.shape[2:]
        share = latent.new_ones((len(latent), height, width))
        if mask is not None:
            share = F.adaptive_avg_pool2d(mask.to(latent)[:, None], (height, width))[:, 0]
        parts.append(floor + (1 - floor) * share)
    return torch.cat(parts)


def with_offset(
    noise: Float[Tensor, "b c h w"], strength: float, seeds: Sequence[int] | Tensor | None
) -> Float[Tensor, "b c h w"]:
    """Noise with a random constant for each sample and channel, so that the mean of a latent is learned, too.

    Offset noise (Guttenberg, 2023, https://www.crosslabs.org/blog/diffusion-with-offset-noise). The constants are a
    function of the samples' seeds, and drawn only if there is a `strength`.
    """
    if not strength:
        return noise
    own = None if seeds is None else [derive_seed("offset", int(seed)) for seed in seeds]
    return noise + strength * SampleRandom(own, noise.device).randn((*noise.shape[:2], 1, 1))


@dataclass(frozen=True)
class PriorPreservation:
    """DreamBooth's objective: loss = subject + reg_weight * prior (Ruiz et al., section 3.2).

    The only code that knows that a batch may hold a subject half and a prior half.
    """

    reg_weight: float = 1.0

    @staticmethod
    def halves(batch: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """`[subject]` or `[subject, prior]`."""
        return [batch] if isinstance(batch, Mapping) else list(batch)

    def combine(self, losses: Sequence[Float[Tensor, ""]]) -> Float[Tensor, ""]:
        """The loss to minimise, of the subject's mean loss and the prior's, if there is one."""
        subject, *prior = losses
        return subject + self.reg_weight * prior[0] if prior else subject


def split_like(values: Tensor, halves: Sequence[Sequence[Any] | Tensor]) -> tuple[Tensor, ...]:
    """Cut what was computed in one pass over all halves back into them."""
    return torch.split(values, [len(half) for half in halves])
