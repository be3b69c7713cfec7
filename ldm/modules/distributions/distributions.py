"""The autoencoder's posterior over latents."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ldm.rng import SampleRandom

Latent = Float[Tensor, "b z *hw"]


class DiagonalGaussianDistribution:
    """Independent normal distributions, one for each element of a latent.

    Args:
        parameters: means, then log variances, along the channels; these are clamped to [-30, 20].
        deterministic: all variances are zero.
    """

    def __init__(self, parameters: Float[Tensor, "b _ *hw"], deterministic: bool = False):
        self.parameters = parameters
        self.deterministic = deterministic
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std = torch.zeros_like(self.mean) if deterministic else torch.exp(0.5 * self.logvar)
        self.var = torch.zeros_like(self.mean) if deterministic else torch.exp(self.logvar)

    def sample(self, noise: Latent | None = None) -> Latent:
        """Return a latent, mean + std * noise; torch's global generator draws missing `noise`."""
        if noise is None:
            noise = SampleRandom(device=self.mean.device).randn(self.mean.shape)
        return self.mean + self.std * noise.to(self.mean)

    def mode(self) -> Latent:
        """Return the most likely latent."""
        return self.mean

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> Float[Tensor, " b"]:
        """Return each sample's KL divergence from `other`, or from the standard normal.

        It is zero if deterministic.
        """
        if self.deterministic:
            return torch.zeros(len(self.mean), device=self.mean.device)
        mean, var, logvar = _wide(self.mean), _wide(self.var), _wide(self.logvar)
        if other is None:
            terms = mean**2 + var - 1 - logvar
        else:
            terms = (
                ((mean - _wide(other.mean)) ** 2 + var) / _wide(other.var)
                - 1
                - logvar
                + _wide(other.logvar)
            )
        return 0.5 * terms.flatten(1).sum(1)

    def nll(self, sample: Latent, dims: Sequence[int] = (1, 2, 3)) -> Tensor:
        """Return the negative log-likelihood of `sample` over `dims`; zero if deterministic."""
        if self.deterministic:
            return torch.zeros_like(_wide(self.mean).sum(tuple(dims)))
        logvar = _wide(self.logvar)
        terms = (
            math.log(2 * math.pi)
            + logvar
            + (_wide(sample) - _wide(self.mean)) ** 2 / _wide(self.var)
        )
        return 0.5 * terms.sum(tuple(dims))


def _wide(x: Tensor) -> Tensor:
    # Half precision has too few digits for sums over thousands of elements.
    return x.to(torch.promote_types(x.dtype, torch.float32))
