"""Linear multistep methods over noise levels: LMS, DEIS and UniPC."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ldm.models.diffusion.dpm_solvers import Multistep, exponential_step
from ldm.models.diffusion.sampler import Noise
from ldm.models.diffusion.sigma_sampler import Denoised

GAUSS = np.polynomial.legendre.leggauss(20)  # nodes and weights on [-1, 1]


def lagrange_integrals(
    nodes: Sequence[float], sigma: float, after: float, logarithmic: bool
) -> list[float]:
    """Integrate each Lagrange polynomial through `nodes` over noise levels from `sigma` to `after`.

    Args:
        nodes: noise levels at which the slope is known.
        logarithmic: polynomials in log(sigma) instead of sigma.
    """
    # Move the nodes of the Gauss rule from [-1, 1] to the step. The rule is exact for
    # polynomials, so in sigma there is no error.
    points = (after + sigma) / 2 + (after - sigma) / 2 * GAUSS[0]
    weights = GAUSS[1] * (after - sigma) / 2
    places = np.log(points) if logarithmic else points
    known = np.log(nodes) if logarithmic else np.asarray(nodes)
    # A Lagrange polynomial is 1 at its own node and 0 at the others. Its integral is the weight
    # of the slope that is known there.
    integrals = []
    for j, own in enumerate(known):
        others = np.delete(known, j)
        values = np.prod([(places - other) / (own - other) for other in others], axis=0)
        integrals.append(float(np.sum(weights * values)))
    return integrals


class LMS(Multistep):
    """Adams-Bashforth of fourth order in sigma, with exact weights for uneven steps."""

    remembered = 3
    logarithmic = False

    def sigma_step(self, x: Tensor, index: int, denoised: Denoised, noise: Noise) -> Tensor:
        """Return x after a multistep over the slopes known so far."""
        sigma, after = self.sigmas[index], self.sigmas[index + 1]
        # The newest slope, and those of earlier steps, which cost no further pass of the model.
        slope = (x - denoised(x, sigma)) / sigma
        known = [(sigma, slope), *self.past]
        if after == 0 and self.logarithmic:  # log(0): the last step is Euler's
            known = known[:1]
        # Integrate the polynomial through the known slopes over the step.
        weights = lagrange_integrals([level for level, _ in known], sigma, after, self.logarithmic)
        for weight, (_, earlier) in zip(weights, known):
            x = x + weight * earlier
        self.remember(sigma, slope)
        return x


class DEIS(LMS):
    """Like LMS, with polynomials in log(sigma), third order (Zhang & Chen 2023, 2204.13902)."""

    remembered = 2
    logarithmic = True


class UniPC(Multistep):
    """UniPC-2, B2(h), on the clean latent: predictor and corrector (Zhao et al., 2302.04867)."""

    remembered = 2

    def reset(self) -> None:
        """Forget the steps of an earlier run."""
        super().reset()
        self._before: Tensor | None = None  # x of the step before

    def sigma_step(self, x: Tensor, index: int, denoised: Denoised, noise: Noise) -> Tensor:
        """Return x after a correction by this level's clean latent, and a prediction."""
        sigma, after = self.sigmas[index], self.sigmas[index + 1]
        start = denoised(x, sigma)
        # Corrector: repeat the last step with what this level has shown. It costs no pass.
        if self._before is not None:
            x = self._corrected(self._before, sigma, start)
        # Predictor: from the corrected x to the next level.
        self._before = x
        self.remember(sigma, start)
        return self._predicted(x, after)

    def _predicted(self, x: Tensor, after: float) -> Tensor:
        """Return x at `after` from the clean latents of this level and the one before."""
        (sigma, start), *earlier = self.past
        new = exponential_step(x, start, sigma, after)
        if after == 0 or not earlier:
            return new
        # Second order: continue D by its last change, with UniPC's weight 1/2 for B2(h).
        h = math.log(sigma / after)
        ((sigma_1, start_1),) = earlier
        ratio = math.log(sigma / sigma_1) / h  # negative: in the past
        return new - math.expm1(-h) * 0.5 * (start_1 - start) / ratio

    def _corrected(self, x: Tensor, sigma: float, start: Tensor) -> Tensor:
        """Return x at `sigma` once more, from the level before, now that `start` is known."""
        (sigma_0, start_0), *earlier = self.past
        new = exponential_step(x, start_0, sigma_0, sigma)
        # The change of D over the step is known now. Without an earlier step it gives second order.
        h = math.log(sigma_0 / sigma)
        base = math.expm1(-h)
        change = start - start_0
        if not earlier:
            return new - base * 0.5 * change
        ((sigma_1, start_1),) = earlier
        # With an earlier step there are two changes, and third order.
        ratio = math.log(sigma_0 / sigma_1) / h
        # The two weights solve the order conditions of 2302.04867, with data prediction.
        phi_1 = base / -h
        phi_2 = (phi_1 - 1) / -h
        phi_3 = (phi_2 - 0.5) / -h
        right = np.array([phi_2, 2 * phi_3]) * -h / base
        weights = np.linalg.solve(np.array([[1.0, 1.0], [ratio, 1.0]]), right)
        return new - base * (
            float(weights[0]) * (start_1 - start_0) / ratio + float(weights[1]) * change
        )
