"""What the UNet's output stands for: the noise (eps), the clean latent (x0) or the velocity (v)."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ldm.models.diffusion.schedule import Latent, NoiseSchedule, Steps


class Parameterization(Protocol):
    """The regression target, and the way back from an output to noise and clean latent."""

    def target(self, schedule: NoiseSchedule, x_start: Latent, t: Steps, noise: Latent) -> Latent: ...
    def to_noise(self, schedule: NoiseSchedule, x_t: Latent, t: Steps, output: Latent) -> Latent: ...
    def to_start(self, schedule: NoiseSchedule, x_t: Latent, t: Steps, output: Latent) -> Latent: ...
    def vlb_weights(self, schedule: NoiseSchedule) -> Tensor: ...
    def min_snr_weight(self, schedule: NoiseSchedule, t: Steps, gamma: float) -> Tensor: ...


def signal_to_noise(schedule: NoiseSchedule, t: Steps) -> Tensor:
    """SNR(t) = acp / (1 - acp), (b,)."""
    acp = schedule.alphas_cumprod[t]
    return acp / (1 - acp)


class Eps:
    """The noise that was added (DDPM, eq. 14)."""

    def target(self, schedule: NoiseSchedule, x_start: Latent, t: Steps, noise: Latent) -> Latent:
        return noise

    def to_noise(self, schedule: NoiseSchedule, x_t: Latent, t: Steps, output: Latent) -> Latent:
        return output

    def to_start(self, schedule: NoiseSchedule, x_t: Latent, t: Steps, output: Latent) -> Latent:
        return schedule.start_from_noise(x_t, t, output)

    def vlb_weights(self, schedule: NoiseSchedule) -> Tensor:
        """Weight of each step in the variational bound, (T,) (DDPM, eq. 12)."""
        s = {name: getattr(schedule, name).double() for name in ("betas", "posterior_variance", "alphas_cumprod")}
        alphas = 1 - s["betas"]
        weights = s["betas"] ** 2 / (2 * s["posterior_variance"] * alphas * (1 - s["alphas_cumprod"]))
        weights[0] = weights[1]  # the variance is 0 at the first step
        return weights.float()

    def min_snr_weight(self, schedule: NoiseSchedule, t: Steps, gamma: float) -> Tensor:
        """min(SNR, gamma) / SNR: a loss on the clean latent has min(SNR, gamma) (Hang et al., 2303.09556, eq. 9)."""
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

    def vlb_weights(self, schedule: NoiseSchedule) -> Tensor:
        """Half the difference of the signal-to-noise ratios of successive steps (Kingma et al. 2021, eq. 13)."""
        acp = schedule.alphas_cumprod.double()
        snr = acp / (1 - acp)
        weights = torch.zeros_like(snr)
        weights[1:] = 0.5 * (snr[:-1] - snr[1:])
        weights[0] = weights[1]
        return weights.float()

    def min_snr_weight(self, schedule: NoiseSchedule, t: Steps, gamma: float) -> Tensor:
        """min(SNR, gamma)."""
        return signal_to_noise(schedule, t).clamp(max=gamma)


class V:
    """The velocity (Salimans & Ho 2022, appendix D)."""

    def target(self, schedule: NoiseSchedule, x_start: Latent, t: Steps, noise: Latent) -> Latent:
        return schedule.velocity(x_start, t, noise)

    def to_noise(self, schedule: NoiseSchedule, x_t: Latent, t: Steps, output: Latent) -> Latent:
        return schedule.noise_from_velocity(x_t, t, output)

    def to_start(self, schedule: NoiseSchedule, x_t: Latent, t: Steps, output: Latent) -> Latent:
        return schedule.start_from_velocity(x_t, t, output)

    def vlb_weights(self, schedule: NoiseSchedule) -> Tensor:
        """Ones: the bound is not used with v, only logged."""
        return torch.ones_like(schedule.betas)

    def min_snr_weight(self, schedule: NoiseSchedule, t: Steps, gamma: float) -> Tensor:
        """min(SNR, gamma) / (SNR + 1)."""
        snr = signal_to_noise(schedule, t)
        return snr.clamp(max=gamma) / (snr + 1)


PARAMETERIZATIONS: dict[str, Parameterization] = {"eps": Eps(), "x0": X0(), "v": V()}
