"""Guidance: move a model's output towards the prompt, away from what it gives without it.

Classifier-free guidance (Ho & Salimans 2022) is always there. What changes it is one small class
each, and they combine: `Rescale`, `Interval`, `Projection` (APG), and a weaker model in place of
the empty prompt (personalization guidance).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.models.diffusion.conditioning import Cond, concat_batches
from ldm.models.diffusion.schedule import NoiseSchedule
from ldm.models.diffusion.sigmas import NoiseLevels, clean_latent, output_slope
from ldm.models.diffusion.thresholding import Threshold

Denoiser = Callable[[Tensor, Tensor], Tensor]
ApplyModel = Callable[[Tensor, Tensor, Any], Tensor]

PIXELS = (1, 2, 3)  # the dimensions of a latent beside the batch


@runtime_checkable
class SampledModel(Protocol):
    """What a sampler needs of a model."""

    @property
    def schedule(self) -> NoiseSchedule:
        """Return the noise schedule, of which a sampler visits some steps."""

    @property
    def parameterization(self) -> str:
        """Return what the output stands for: a name in `PARAMETERIZATIONS`."""

    @property
    def threshold(self) -> Threshold | None:
        """Return what is done to each predicted clean latent; None for nothing."""

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Any) -> Tensor:
        """Return the output for noisy latents at time steps `t`."""


# What changes classifier-free guidance


@dataclass(frozen=True)
class Rescale:
    """Give the guided output the spread of the prompt's own (Lin et al., 2305.08891).

    A large scale makes outputs too large, and pictures too bright.

    Args:
        share: how much of the result is rescaled, from 0 to 1; the paper takes 0.7.
    """

    share: float

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise UserError(f"rescale: expected a number from 0 to 1, got {self.share}")

    def __call__(self, output: Tensor, cond: Tensor) -> Tensor:
        """Return the guided output with its spread per sample moved towards that of `cond`."""
        # Lin et al., eq. 15 and 16: rescale, then mix, because the full rescaling looks dull.
        wanted, found = (x.std(PIXELS, keepdim=True) for x in (cond, output))
        return self.share * (output * (wanted / found)) + (1 - self.share) * output


@dataclass(frozen=True)
class Interval:
    """Guide at some noise levels alone (Kynkäänniemi et al., 2404.07724).

    Where noise is large, guidance takes variety away; where it is small, it does nothing. Outside
    of the interval the model runs once instead of twice.

    Args:
        low, high: noise levels sigma, as in `sigmas.py`: guided above `low`, and up to `high`.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high:
            raise UserError(
                f"interval of guidance: expected 0 <= low < high, got {self.low:g} {self.high:g}"
            )

    def holds(self, sigma: float) -> bool:
        """Return whether a noise level is in the interval."""
        return self.low < sigma <= self.high


@dataclass(frozen=True)
class Projection:
    """Adaptive projected guidance (Sadat et al., 2410.02416), on clean latents.

    The difference of the two predictions is averaged over steps, cut to a length, and freed of its
    part along the prompt's own prediction, which is what makes colours too strong.

    Args:
        parallel: how much of that part stays (eta); 1 keeps it, as classifier-free guidance does.
        norm: the length that the difference may have (r); 0 is no limit.
        momentum: of the average (beta); negative ones push away from earlier differences.
    """

    parallel: float = 0.0
    norm: float = 7.5
    momentum: float = -0.75

    def __post_init__(self) -> None:
        if not math.isfinite(self.parallel):
            raise UserError(f"projected guidance: eta must be a number, got {self.parallel:g}")
        if not 0 <= self.norm < math.inf or not -1 < self.momentum < 1:
            raise UserError(
                "projected guidance: norm must be at least 0 and momentum between -1 and 1, "
                f"got {self.norm:g} and {self.momentum:g}"
            )

    def update(self, difference: Tensor, start: Tensor) -> Tensor:
        """Return the direction to go in, from the averaged difference and the prompt's x_0."""
        # Cut the length, so that one step with a large difference does not decide on the picture.
        if self.norm > 0:
            length = difference.square().sum(PIXELS, keepdim=True).sqrt()
            # A difference of 0 stays 0.
            difference = difference * (self.norm / length.clamp(min=1e-12)).clamp(max=1)
        # Split off the part along the clean latent, which makes contrast stronger, not the content.
        along = (difference * start).sum(PIXELS, keepdim=True)
        along = along / start.square().sum(PIXELS, keepdim=True).clamp(min=1e-12) * start
        return difference - along + self.parallel * along


@dataclass(frozen=True)
class Guidance:
    """What changes classifier-free guidance; nothing by default.

    Args:
        weak: a weaker model, whose output takes the place of the one without the prompt
            (personalization guidance, Park et al., 2508.00319): of a tuned model its base model,
            or one between the two. It gets the unconditional conditioning.
    """

    rescale: Rescale | None = None
    interval: Interval | None = None
    projection: Projection | None = None
    weak: ApplyModel | None = None


# What a sampler calls


def guided(
    model: SampledModel,
    cond: Cond | None,
    uncond: Cond | None,
    scale: float,
    guidance: Guidance | None = None,
) -> Denoiser:
    """Return `(x_t, t) -> output`, moved away from the unconditional output by `scale`, in float32.

    With scale 1 or no `uncond` the model runs on the conditioning alone.
    """

    def conditional(x: Tensor, t: Tensor) -> Tensor:
        return model.apply_model(x, t, cond).float()

    # With scale 1, eq. 6 is the conditional output alone, and the unconditional one is not needed.
    if uncond is None or scale == 1.0:
        return conditional
    # Decide once what each step needs.
    how = guidance or Guidance()
    outputs = _both_outputs(model, cond, uncond, how.weak)
    noise_level = _noise_level(model.schedule) if how.interval or how.projection else None
    difference: Tensor | None = None  # of clean latents, averaged over steps

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        nonlocal difference
        # The noise level is one number read back from the device, only where it is needed.
        sigma = noise_level(t) if noise_level else 0.0
        if how.interval and not how.interval.holds(sigma):
            return conditional(x, t)

        # Move the output away from the unconditional one.
        output_uncond, output_cond = outputs(x, t)
        if how.projection is None:
            # Ho & Salimans, eq. 6, with scale = 1 + w. It is written for noise, and holds for x0
            # and v as well: at a given x_t the noise is an affine function of each, and the weights
            # of the two outputs sum to 1.
            output = output_uncond + scale * (output_cond - output_uncond)
        else:
            # APG is written for clean latents. At a given x_t an output is an affine function of
            # the clean latent, so a move of one is a move of the other, times the slope.
            kind, slope = model.parameterization, output_slope(model.parameterization, sigma)
            start = clean_latent(kind, x * math.sqrt(1 + sigma**2), sigma, output_cond)
            newest = (output_cond - output_uncond) / slope
            past = 0 if difference is None else how.projection.momentum * difference
            difference = newest + past
            move = how.projection.update(difference, start)
            output = output_cond + (scale - 1) * slope * move
        return how.rescale(output, output_cond) if how.rescale else output

    return denoise


def _both_outputs(
    model: SampledModel, cond: Cond | None, uncond: Cond | None, weak: ApplyModel | None
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return `(x_t, t) -> unconditional and conditional output`, in float32."""
    # From here on in float32: under autocast the scale would magnify the output's rounding.
    if weak is not None:
        return lambda x, t: (weak(x, t, uncond).float(), model.apply_model(x, t, cond).float())
    # Joined once here, not in every step.
    both = concat_batches(uncond, cond)

    def outputs(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        # One pass of the model over both is faster than two.
        output = model.apply_model(torch.cat([x, x]), torch.cat([t, t]), both).float()
        output_uncond, output_cond = output.chunk(2)
        return output_uncond, output_cond

    return outputs


def _noise_level(schedule: NoiseSchedule) -> Callable[[Tensor], float]:
    """Return a function from time steps, which are all the same, to their noise level."""
    levels = NoiseLevels.of(schedule)
    return lambda t: float(levels.sigma(float(t[0])))
