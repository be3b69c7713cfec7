"""Ancestral sampling from the model's reverse process (DDPM, algorithm 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.models.diffusion.guidance import Denoiser
from ldm.models.diffusion.sampler import Noise, Sampler, uniform_timesteps


class DDPMSampler(Sampler):
    """x_{t-1} ~ q(x_{t-1} | x_t, predicted x_0), through every time step of the schedule."""

    supports_eta = False

    def timesteps(self, steps: int) -> Tensor:
        # The posterior that is sampled from is one of neighbouring steps (DDPM, eq. 6), so no step
        # can be left out.
        total = len(self.schedule)
        if steps != total:
            message = f"the DDPM sampler visits all {total} time steps, not {steps}"
            raise UserError(f"{message}: or use DDIM with eta 1")
        return uniform_timesteps(steps, total)

    def step(self, x: Tensor, index: int, denoise: Denoiser, noise: Noise) -> tuple[Tensor, Tensor]:
        t = self._batch_of(index, x)
        # The output gives a predicted x_0, for an eps-model as in DDPM, eq. 15. It takes the place
        # of the true x_0 in the posterior (eq. 6 and 7).
        _, pred_x0 = self._predictions(x, index, denoise(x, t))
        mean, log_variance = self.schedule.q_posterior(pred_x0, x, t)
        # The last step returns the mean, without noise that nothing would remove again
        # (DDPM, algorithm 2, line 3).
        if index == 0:
            return mean, pred_x0
        # The variance is the posterior's, the smaller one of the two choices in DDPM, section 3.2.
        return mean + torch.exp(0.5 * log_variance) * noise(), pred_x0
