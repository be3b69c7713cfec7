"""The sampling loop in Karras's notation: x = x_0 + sigma eps, from the largest sigma to 0."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.models.diffusion.guidance import Denoiser
from ldm.models.diffusion.sampler import Noise, Sampler
from ldm.models.diffusion.sigmas import (
    NoiseLevels,
    batch_of,
    check_descending,
    clean_latent,
    noise_levels,
    scaled_to_model,
)

# The clean latent that the model predicts from x at a noise level.
Denoised = Callable[[Tensor, float], Tensor]


class SigmaSampler(Sampler):
    """Draws latents by steps between noise levels.

    A subclass gives `sigma_step`; the loop is that of `Sampler`. Noise levels are Python floats, so
    it waits for no GPU.

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
        """Return x after a step, and the first x_0 that was predicted in it."""
        predicted: list[Tensor] = []

        # The model knows x_t and time steps. Translate to them and back, so that a method can be
        # written down as its paper has it.
        def denoised(x: Tensor, sigma: float) -> Tensor:
            t = batch_of(self.levels.timestep(sigma), x)
            output = denoise(scaled_to_model(x, sigma), t)
            start = clean_latent(str(self.model.parameterization), x, sigma, output)
            predicted.append(start if self.threshold is None else self.threshold(start))
            return predicted[-1]

        # The loop counts steps down, noise levels are listed from the largest.
        x = self.sigma_step(x, self._place(index), denoised, noise)
        # A method may ask the model again later in the step. The prediction to show is that for
        # the x of its beginning.
        return x, predicted[0]

    def make_schedule(
        self,
        ddim_num_steps: int,
        ddim_discretize: str = "uniform",
        ddim_eta: float = 0.0,
        verbose: bool = True,
    ) -> None:
        """Fix the noise levels of `ddim_num_steps` steps; `sample` does it itself."""
        # Noise that is renewed belongs to the method here, so there is no eta to choose.
        if ddim_eta:
            raise UserError(f"{type(self).__name__}: eta is for DDIM: it must be 0, got {ddim_eta}")
        self.schedule = self.model.schedule
        # The levels that the model was trained at bound those that are visited.
        self.levels = NoiseLevels.of(self.schedule)
        self.sigmas = noise_levels(self.noise_schedule, self.levels, ddim_num_steps)
        check_descending(self.sigmas)

    def _place(self, index: int) -> int:
        """Return where in `sigmas` a step begins, of which `index` steps are left after it."""
        # The last entry is 0, where no step begins.
        return len(self.sigmas) - 2 - index

    def _scaled(self, x: Tensor, steps: int) -> Tensor:
        """Return x_0 + sigma eps of x_t, from which `steps` steps are left."""
        # sqrt(acp) = 1 / sqrt(1 + sigma^2): x_t divided by it is x_0 + sigma eps.
        return x * math.sqrt(1 + self.sigmas[self._place(steps - 1)] ** 2)

    def _noised(self, x0: Tensor, index: int, noise: Tensor) -> Tensor:
        """Return x0 with the noise level at which the step begins."""
        return x0 + self.sigmas[self._place(index)] * noise

    @torch.no_grad()
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
        # The caller expects the model's x_t, which `decode` scales back.
        index = int(t.flatten()[0])
        return scaled_to_model(self._noised(x0, index, noise), self.sigmas[self._place(index)])


def ancestral(sigma: float, after: float) -> tuple[float, float]:
    """Split a step: the noise level to go down to, and the noise to add so that `after` is reached.

    The split is that of the reverse process (Song et al. 2021, 2011.13456).
    """
    # Variances add: down^2 + up^2 = after^2.
    up = min(after, math.sqrt(after**2 * (sigma**2 - after**2) / sigma**2))
    return math.sqrt(after**2 - up**2), up
