"""What the UNet's output stands for: the noise (eps), the clean latent (x0) or the velocity (v)."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from ldm.models.diffusion.schedule import Latent, NoiseSchedule, Steps


@runtime_checkable
class Parameterization(Protocol):
    """The regression target, and the way back from an output to noise and clean latent."""

    def target(
        self, schedule: NoiseSchedule, x_start: Latent, t: Steps, noise: Latent
    ) -> Latent: ...
    def to_noise(
        self, schedule: NoiseSchedule, x_t: Latent, t: Steps, output: Latent
    ) -> Latent: ...
    def to_start(
        self, schedule: NoiseSchedule, x_t: Latent, t: Steps, output: Latent
    ) -> Latent: ...
    def vlb_weights(self, schedule: NoiseSchedule) -> Float[Tensor, " T"]: ...
    def min_snr_weight(
        self, schedule: NoiseSchedule, t: Steps, gamma: float
    ) -> Float[Tensor, " b"]: ...


def signal_to_noise(schedule: NoiseSchedule, t: Steps) -> Float[Tensor, " b"]:
    """Return SNR(t) = acp / (1 - acp)."""
    # The squared factors of signal and noise (DDPM, eq. 4), for latents of unit variance.
    acp = schedule.alphas_cumprod[t]
    return acp / (1 - acp)


class Eps:
    """The noise that was added (DDPM, eq. 14)."""

    def target(self, schedule: NoiseSchedule, x_start: Latent, t: Steps, noise: Latent) -> Latent:
        return noise

    def to_noise(self, schedule: NoiseSchedule, x_t: Latent, t: Steps, output: Latent) -> Latent:
        return output

    def to_start(self, schedule: NoiseSchedule, x_t: Latent, t: Steps, output: Latent) -> Latent:
        # DDPM, eq. 15.
        return schedule.start_from_noise(x_t, t, output)

    def vlb_weights(self, schedule: NoiseSchedule) -> Float[Tensor, " T"]:
        """Return each step's weight in the variational bound (DDPM, eq. 12)."""
        betas, acp = schedule.betas.double(), schedule.alphas_cumprod.double()
        # The equation's sigma squared is the posterior's variance.
        variance = schedule.posterior_variance.double()
        weights = betas**2 / (2 * variance * (1 - betas) * (1 - acp))
        # At the first step the variance is 0.
        weights[0] = weights[1]
        return weights.float()

    def min_snr_weight(
        self, schedule: NoiseSchedule, t: Steps, gamma: float
    ) -> Float[Tensor, " b"]:
        """Return min(SNR, gamma) / SNR (Hang et al., 2303.09556)."""
        # A squared error of the noise is one of the clean latent times SNR.
        snr = signal_to_noise(schedule, t)
        return snr.clamp(max=gamma) / snr


class X0:
    """The clean latent itself."""

    def target(self, schedule: NoiseSchedule, x_start: Latent, t: Steps, noise: Latent) -> Latent:
        return x_start

    def to_noise(self, schedule: NoiseSchedule, x_t: Latent, t: Steps, output: Latent) -> Latent:
        return schedule.noise_from_start(x_t, t, output)

    def to_start(self, schedule: NoiseSchedule, x_t: Latent, t: Steps, output: Latent) -> Latent:
        return output

    def vlb_weights(self, schedule: NoiseSchedule) -> Float[Tensor, " T"]:
        """Return half the difference of successive steps' SNR (Kingma et al. 2021, 2107.00630)."""
        acp = schedule.alphas_cumprod.double()
        snr = acp / (1 - acp)
        weights = torch.zeros_like(snr)
        weights[1:] = 0.5 * (snr[:-1] - snr[1:])
        # No step is before the first, whose difference would be infinite.
        weights[0] = weights[1]
        return weights.float()

    def min_snr_weight(
        self, schedule: NoiseSchedule, t: Steps, gamma: float
    ) -> Float[Tensor, " b"]:
        """Return min(SNR, gamma) (Hang et al., 2303.09556)."""
        # A loss on x_0 has weight 1 at every step, so the weight is the clamped SNR itself.
        return signal_to_noise(schedule, t).clamp(max=gamma)


class V:
    """The velocity (Salimans & Ho 2022)."""

    def target(self, schedule: NoiseSchedule, x_start: Latent, t: Steps, noise: Latent) -> Latent:
        # v mixes noise and x_0, so it is worth predicting at both ends: where one of the two is
        # almost known, v is almost the other.
        return schedule.velocity(x_start, t, noise)

    def to_noise(self, schedule: NoiseSchedule, x_t: Latent, t: Steps, output: Latent) -> Latent:
        return schedule.noise_from_velocity(x_t, t, output)

    def to_start(self, schedule: NoiseSchedule, x_t: Latent, t: Steps, output: Latent) -> Latent:
        return schedule.start_from_velocity(x_t, t, output)

    def vlb_weights(self, schedule: NoiseSchedule) -> Float[Tensor, " T"]:
        """Return ones: the bound is not used with v, only logged."""
        # A placeholder, as in the reference: no bound is derived for v.
        return torch.ones_like(schedule.betas)

    def min_snr_weight(
        self, schedule: NoiseSchedule, t: Steps, gamma: float
    ) -> Float[Tensor, " b"]:
        """Return min(SNR, gamma) / (SNR + 1)."""
        # A squared error of the velocity is one of the clean latent times SNR + 1.
        snr = signal_to_noise(schedule, t)
        return snr.clamp(max=gamma) / (snr + 1)


# The closed set that configs name. A new one is a class and a line here.
PARAMETERIZATIONS: dict[str, Parameterization] = {"eps": Eps(), "x0": X0(), "v": V()}
