"""DPM-Solver-2 and the DPM-Solver++ family (Lu et al., 2206.00927 and 2211.01095).

With lambda = -log(sigma) the exact solution over a step of h in lambda is, in terms of the clean
latent D: x' = (sigma' / sigma) x + sigma' * integral of e^lambda D. What the solvers differ in is
how D is continued over the step.
"""

from __future__ import annotations

import math

from torch import Tensor

from ldm.models.diffusion.sampler import Noise
from ldm.models.diffusion.sigma_sampler import Denoised, SigmaSampler, ancestral


def exponential_step(x: Tensor, start: Tensor, sigma: float, after: float) -> Tensor:
    """Return x at `after` if the clean latent stays what it is."""
    ratio = after / sigma
    return ratio * x + (1 - ratio) * start


def middle(sigma: float, after: float) -> float:
    """Return the noise level halfway between two in log(sigma)."""
    return math.sqrt(sigma * after)


class DPM2(SigmaSampler):
    """Second order: the slope at the middle of the step (2206.00927, DPM-Solver-2)."""

    def sigma_step(self, x: Tensor, index: int, denoised: Denoised, noise: Noise) -> Tensor:
        """Return x after one midpoint step."""
        return self.midpoint(x, self.sigmas[index], self.sigmas[index + 1], denoised)

    @staticmethod
    def midpoint(x: Tensor, sigma: float, after: float, denoised: Denoised) -> Tensor:
        """Return x at `after`, by the slope in the middle."""
        # Euler's slope, which is all there is at sigma 0: its logarithm has no middle.
        slope = (x - denoised(x, sigma)) / sigma
        if after == 0:
            return x - sigma * slope
        # The slope of the middle stands for the whole step. Halfway is in log(sigma), in which the
        # ODE is smooth.
        half = middle(sigma, after)
        x_half = x + (half - sigma) * slope
        slope = (x_half - denoised(x_half, half)) / half
        return x + (after - sigma) * slope


class DPM2Ancestral(DPM2):
    """DPM2 to below the next noise level, and noise up to it."""

    def sigma_step(self, x: Tensor, index: int, denoised: Denoised, noise: Noise) -> Tensor:
        """Return x after a midpoint step and fresh noise."""
        # The deterministic method goes down too far; fresh noise comes back up.
        down, up = ancestral(self.sigmas[index], self.sigmas[index + 1])
        x = self.midpoint(x, self.sigmas[index], down, denoised)
        return x + up * noise() if up > 0 else x


class DPMpp2SAncestral(SigmaSampler):
    """DPM-Solver++(2S), single step, with noise renewed (2211.01095)."""

    def sigma_step(self, x: Tensor, index: int, denoised: Denoised, noise: Noise) -> Tensor:
        """Return x after a second-order step and fresh noise."""
        sigma, after = self.sigmas[index], self.sigmas[index + 1]
        # Leave room for the noise that is renewed: the deterministic part ends at `down`.
        down, up = ancestral(sigma, after)
        start = denoised(x, sigma)
        # Second order: take the clean latent of the middle for the whole step (algorithm 1).
        if down > 0:
            half = middle(sigma, down)
            x_half = exponential_step(x, start, sigma, half)
            start = denoised(x_half, half)
        # Go down, and renew the noise that was left out.
        x = exponential_step(x, start, sigma, down)
        return x + up * noise() if up > 0 else x


class DPMppSDE(SigmaSampler):
    """DPM-Solver++ for the stochastic equation, single step, second order.

    Both noises of a step are increments of one Brownian path in sigma.
    """

    def sigma_step(self, x: Tensor, index: int, denoised: Denoised, noise: Noise) -> Tensor:
        """Return x after a second-order stochastic step."""
        sigma, after = self.sigmas[index], self.sigmas[index + 1]
        start = denoised(x, sigma)
        # The last step ends in the clean latent, without noise, as log(0) has no value.
        if after == 0:
            return start
        # To the middle of the step.
        half = middle(sigma, after)
        down, up = ancestral(sigma, half)
        first = noise()
        x_half = exponential_step(x, start, sigma, down) + up * first
        start_half = denoised(x_half, half)
        # Over the whole step, with the clean latent of its middle.
        down, up = ancestral(sigma, after)
        whole = first * math.sqrt(sigma - half) + noise() * math.sqrt(half - after)
        x = exponential_step(x, start_half, sigma, down)
        return x + up * whole / math.sqrt(sigma - after)


class Multistep(SigmaSampler):
    """Remembers the clean latents of earlier steps, latest first, each with its noise level."""

    remembered = 1

    def reset(self) -> None:
        """Forget the steps of an earlier run."""
        self.past: list[tuple[float, Tensor]] = []

    def remember(self, sigma: float, start: Tensor) -> None:
        """Keep the clean latent of a step that is done."""
        self.past = [(sigma, start), *self.past][: self.remembered]


class DPMpp2M(Multistep):
    """DPM-Solver++(2M): D is continued by its last change (2211.01095)."""

    def sigma_step(self, x: Tensor, index: int, denoised: Denoised, noise: Noise) -> Tensor:
        """Return x after a second-order multistep."""
        sigma, after = self.sigmas[index], self.sigmas[index + 1]
        start = denoised(x, sigma)
        continued = start
        # The first step knows no change, and the last one has an infinite h: both keep D as it is.
        if self.past and after > 0:
            (sigma_before, start_before), *_ = self.past
            ratio = math.log(sigma_before / sigma) / math.log(sigma / after)
            continued = start + (start - start_before) / (2 * ratio)
        self.remember(sigma, start)
        return exponential_step(x, continued, sigma, after)


class DPMpp2MSDE(Multistep):
    """SDE-DPM-Solver++(2M), midpoint (2211.01095)."""

    def sigma_step(self, x: Tensor, index: int, denoised: Denoised, noise: Noise) -> Tensor:
        """Return x after a second-order stochastic multistep."""
        sigma, after = self.sigmas[index], self.sigmas[index + 1]
        start = denoised(x, sigma)
        # The last step ends in the clean latent, without noise.
        if after == 0:
            return start
        # First order: D stays what it is. `share` is how much of the noise is drawn anew.
        h = math.log(sigma / after)
        share = -math.expm1(-2 * h)
        new = math.exp(-2 * h) * x + share * start
        # Second order: D goes on changing as it did in the last step.
        if self.past:
            (sigma_before, start_before), *_ = self.past
            ratio = math.log(sigma_before / sigma) / h
            new = new + share / 2 * (start - start_before) / ratio
        self.remember(sigma, start)
        # The stochastic equation's noise over the step: as much as was taken out.
        return new + after * math.sqrt(share) * noise()


class DPMpp3MSDE(Multistep):
    """SDE-DPM-Solver++(3M): D is continued by its last two changes."""

    remembered = 2

    def sigma_step(self, x: Tensor, index: int, denoised: Denoised, noise: Noise) -> Tensor:
        """Return x after a third-order stochastic multistep."""
        sigma, after = self.sigmas[index], self.sigmas[index + 1]
        start = denoised(x, sigma)
        # The last step ends in the clean latent, without noise.
        if after == 0:
            return start
        # First order: D stays what it is.
        h = math.log(sigma / after)
        twice = 2 * h  # the step of the stochastic equation, whose drift is twice the ODE's
        new = math.exp(-twice) * x - math.expm1(-twice) * start
        # Weights of D's first and second derivative over the step: integrals of the exponential
        # with a power of time (phi functions).
        phi_2 = math.expm1(-twice) / twice + 1
        phi_3 = phi_2 / twice - 0.5
        # Divided differences, by Newton's rule, of as many earlier steps as there are.
        if len(self.past) == 1:
            ((sigma_1, start_1),) = self.past
            ratio = math.log(sigma_1 / sigma) / h
            new = new + phi_2 * (start - start_1) / ratio
        elif self.past:
            (sigma_1, start_1), (sigma_2, start_2) = self.past
            ratio_0 = math.log(sigma_1 / sigma) / h
            ratio_1 = math.log(sigma_2 / sigma_1) / h
            change_0 = (start - start_1) / ratio_0
            change_1 = (start_1 - start_2) / ratio_1
            # The slope is that of the parabola through three clean latents, at the newest of them.
            slope = change_0 + (change_0 - change_1) * ratio_0 / (ratio_0 + ratio_1)
            curvature = (change_0 - change_1) / (ratio_0 + ratio_1)
            new = new + phi_2 * slope - phi_3 * curvature
        self.remember(sigma, start)
        return new + after * math.sqrt(-math.expm1(-twice)) * noise()
