"""Euler's method, Heun's, and the samplers that renew noise after an Euler step."""

from __future__ import annotations

from torch import Tensor

from ldm.models.diffusion.sampler import Noise
from ldm.models.diffusion.sigma_sampler import Denoised, SigmaSampler, ancestral


class Euler(SigmaSampler):
    """One step along dx/dsigma = (x - D(x, sigma)) / sigma (Karras et al. 2022)."""

    def sigma_step(self, x: Tensor, index: int, denoised: Denoised, noise: Noise) -> Tensor:
        """Return x after one Euler step."""
        sigma, after = self.sigmas[index], self.sigmas[index + 1]
        # The direction of the probability-flow ODE at x (Karras et al., eq. 1 and 3).
        slope = (x - denoised(x, sigma)) / sigma
        return x + (after - sigma) * slope


class EulerAncestral(SigmaSampler):
    """Goes further down by Euler's method than the next noise level, and adds noise up to it."""

    def sigma_step(self, x: Tensor, index: int, denoised: Denoised, noise: Noise) -> Tensor:
        """Return x after an Euler step and fresh noise."""
        sigma, after = self.sigmas[index], self.sigmas[index + 1]
        # Noise is renewed: some of the step goes down too far, and fresh noise comes back up.
        down, up = ancestral(sigma, after)
        slope = (x - denoised(x, sigma)) / sigma
        x = x + (down - sigma) * slope
        return x + up * noise() if up > 0 else x


class Heun(SigmaSampler):
    """Second order: the mean of the slopes at both ends (Karras et al. 2022)."""

    def sigma_step(self, x: Tensor, index: int, denoised: Denoised, noise: Noise) -> Tensor:
        """Return x after one step of Heun's method."""
        sigma, after = self.sigmas[index], self.sigmas[index + 1]
        slope = (x - denoised(x, sigma)) / sigma
        # An Euler step, which is corrected where the slope at its end is known (algorithm 1).
        ahead = x + (after - sigma) * slope
        if after == 0:  # no slope at sigma 0
            return ahead
        # The trapezoid rule: the mean of both slopes leaves an error of third order in the step.
        slope_ahead = (ahead - denoised(ahead, after)) / after
        return x + (after - sigma) * (slope + slope_ahead) / 2


class LCM(SigmaSampler):
    """Takes the clean latent, and adds the next level's noise (Luo et al. 2023, 2310.04378)."""

    def sigma_step(self, x: Tensor, index: int, denoised: Denoised, noise: Noise) -> Tensor:
        """Return the predicted clean latent with fresh noise."""
        # A consistency model predicts the end of the path from anywhere on it. Noise of the next
        # level puts x back on a path, where the next prediction is better.
        start = denoised(x, self.sigmas[index])
        after = self.sigmas[index + 1]
        return start + after * noise() if after > 0 else start
