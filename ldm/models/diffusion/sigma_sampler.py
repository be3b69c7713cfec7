"""The sampling loop in Karras's notation: x = x_0 + sigma eps, from the largest sigma to 0."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.errors import UserError
from ldm.models.diffusion.guidance import Denoiser
from ldm.models.diffusion.sampler import Sampler
from ldm.models.diffusion.sigmas import (
    NoiseLevels,
    batch_of,
    check_descending,
    clean_latent,
    noise_levels,
    scaled_to_model,
)
from ldm.rng import SampleRandom

# The clean latent that the model predicts from x at a noise level.
Denoised = Callable[[Tensor, float], Tensor]
Noise = Callable[[], Tensor]


class SigmaSampler(Sampler):
    """Draws latents by steps between noise levels.

    A subclass gives `sigma_step`. Noise levels are Python floats, so the loop waits for no GPU.

    Args:
        model: a `LatentDiffusion`.
        schedule: a name in `SCHEDULES`.
    """

    supports_eta = False

    def __init__(self, model: Any, schedule: str = "normal"):
        super().__init__(model)
        self.noise_schedule = schedule
        self.sigmas: list[float] = []

    @abstractmethod
    def sigma_step(self, x: Tensor, index: int, denoised: Denoised, noise: Noise) -> Tensor:
        """Return x at noise level `sigmas[index + 1]` from x at `sigmas[index]`.

        `denoised(x, sigma)` is the predicted clean latent; `noise()` a fresh draw of x's shape.
        """

    def step(self, x: Tensor, index: int, denoise: Denoiser, noise: Noise) -> tuple[Tensor, Tensor]:
        """Not used: `sigma_step` takes its place."""
        raise NotImplementedError

    def make_schedule(
        self,
        ddim_num_steps: int,
        ddim_discretize: str = "uniform",
        ddim_eta: float = 0.0,
        verbose: bool = True,
    ) -> None:
        """Fix the noise levels of `ddim_num_steps` steps; `sample` does it itself."""
        if ddim_eta:
            raise UserError(f"{type(self).__name__}: eta is for DDIM: it must be 0, got {ddim_eta}")
        self.schedule = self.model.schedule
        self.levels = NoiseLevels.of(self.schedule)
        self.sigmas = noise_levels(self.noise_schedule, self.levels, ddim_num_steps)
        check_descending(self.sigmas)

    def _run(
        self,
        x: Tensor,
        steps: int,
        denoise: Denoiser,
        random: SampleRandom,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        temperature: float = 1.0,
        verbose: bool = True,
        log_every_t: int = 100,
        callback: Callable[[int], None] | None = None,
        img_callback: Callable[[Tensor, int], None] | None = None,
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Take the last `steps` steps, from x_t as the model has it."""
        self.reset()
        predicted: list[Tensor] = []

        def denoised(x: Tensor, sigma: float) -> Tensor:
            t = batch_of(self.levels.timestep(sigma), x)
            output = denoise(scaled_to_model(x, sigma), t)
            predicted.append(clean_latent(str(self.model.parameterization), x, sigma, output))
            return predicted[-1]

        def noise() -> Tensor:
            return temperature * random.randn(x.shape)

        # The steps to take: all of them, or the last ones of an image that got some noise.
        first = len(self.sigmas) - 1 - steps
        x = x * math.sqrt(1 + self.sigmas[first] ** 2)
        intermediates: dict[str, list[Tensor]] = {"x_inter": [x], "pred_x0": [x]}
        order = tqdm(range(first, first + steps), type(self).__name__, disable=not verbose)
        for number, index in enumerate(order):
            sigma = self.sigmas[index]
            # Outside of what is painted anew, the latent follows x0 with the noise of this level.
            if mask is not None and x0 is not None:
                x = mask * (x0 + sigma * random.randn(x.shape)) + (1 - mask) * x
            predicted.clear()
            x = self.sigma_step(x, index, denoised, noise)
            if callback:
                callback(number)
            if img_callback:
                img_callback(predicted[0], number)
            if (steps - 1 - number) % log_every_t == 0 or number == 0:
                intermediates["x_inter"].append(x)
                intermediates["pred_x0"].append(predicted[0])
        return x, intermediates

    def stochastic_encode(
        self, x0: Tensor, t: Tensor, use_original_steps: bool = False, noise: Tensor | None = None
    ) -> Tensor:
        """Return x0 with the noise from which `decode` takes the last `t + 1` steps.

        Args:
            t: one number for all samples; a time step of the schedule with `use_original_steps`.
        """
        if use_original_steps:
            return super().stochastic_encode(x0, t, use_original_steps, noise)
        noise = torch.randn_like(x0) if noise is None else noise
        sigma = self.sigmas[len(self.sigmas) - 2 - int(t.flatten()[0])]
        return scaled_to_model(x0 + sigma * noise, sigma)


def ancestral(sigma: float, after: float) -> tuple[float, float]:
    """Split a step: the noise level to go down to, and the noise to add so that `after` is reached.

    The split is that of the reverse process (Song et al. 2021, 2011.13456, appendix F).
    """
    up = min(after, math.sqrt(after**2 * (sigma**2 - after**2) / sigma**2))
    return math.sqrt(after**2 - up**2), up
