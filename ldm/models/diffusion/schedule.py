"""The forward process: how much signal and noise a latent holds at each time step (Ho et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ldm.errors import ParameterError

Latent = Float[Tensor, "b c h w"]
Steps = Int[Tensor, " b"]


def make_betas(schedule: str, timesteps: int, linear_start: float, linear_end: float, cosine_s: float) -> np.ndarray:
    """Noise added at each step, float64. `linear` is linear in sqrt(beta), as Stable Diffusion's is."""
    if schedule == "linear":
        return np.linspace(linear_start**0.5, linear_end**0.5, timesteps, dtype=np.float64) ** 2
    if schedule == "sqrt_linear":
        return np.linspace(linear_start, linear_end, timesteps, dtype=np.float64)
    if schedule == "cosine":  # Nichol & Dhariwal 2021, eq. 17
        steps = np.arange(timesteps + 1, dtype=np.float64) / timesteps + cosine_s
        alphas_cumprod = np.cos(steps / (1 + cosine_s) * np.pi / 2) ** 2
        return np.clip(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], 0, 0.999)
    raise ParameterError("beta_schedule", f"unknown '{schedule}'; accepted: linear, sqrt_linear, cosine")


def with_zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Betas after which no signal is left, the first step's as it was (Lin et al., 2305.08891, algorithm 1)."""
    root = np.sqrt(np.cumprod(1 - betas))
    acp = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return 1 - acp / np.append(1.0, acp[:-1])


def at(values: Float[Tensor, " T"], t: Steps) -> Float[Tensor, "b 1 1 1"]:
    """The entries of a schedule at time steps `t`, shaped to multiply a batch of latents."""
    return values[t].reshape(-1, 1, 1, 1)


@dataclass(frozen=True)
class NoiseSchedule:
    """Every quantity of the forward process that is a function of the time step alone, each (T,).

    The field names are the buffers of a CompVis checkpoint. Computed in float64, then cast to float32. Where no signal
    is left (zero terminal SNR), the two reciprocals are 0 instead of infinite.
    """

    betas: Tensor
    alphas_cumprod: Tensor
    alphas_cumprod_prev: Tensor
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    log_one_minus_alphas_cumprod: Tensor
    sqrt_recip_alphas_cumprod: Tensor
    sqrt_recipm1_alphas_cumprod: Tensor
    posterior_variance: Tensor
    posterior_log_variance_clipped: Tensor
    posterior_mean_coef1: Tensor
    posterior_mean_coef2: Tensor

    @classmethod
    def create(
        cls,
        timesteps: int = 1000,
        beta_schedule: str = "linear",
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
        zero_terminal_snr: bool = False,
    ) -> NoiseSchedule:
        """The schedule for `timesteps` steps, whose last is noise alone with `zero_terminal_snr`.

        Raises:
            UserError: an unknown `beta_schedule`, or betas that leave (0, 1).
        """
        betas = np.empty(0)
        if timesteps > 0 and min(linear_start, linear_end) > 0:  # no roots of negative numbers
            betas = make_betas(beta_schedule, timesteps, linear_start, linear_end, cosine_s)
        if not (betas.size and (betas > 0).all() and (betas < 1).all()):
            raise ParameterError(
                "timesteps",
                f"{timesteps}, with linear_start {linear_start} and linear_end {linear_end}, "
                "gives betas outside (0, 1)",
            )
        if zero_terminal_snr and timesteps < 2:
            raise ParameterError("zero_terminal_snr", f"needs 2 timesteps or more, got {timesteps}")
        return cls.of_betas(with_zero_terminal_snr(betas) if zero_terminal_snr else betas)

    @classmethod
    def of_betas(cls, betas: np.ndarray) -> NoiseSchedule:
        """The schedule of betas in (0, 1), of which the last may be 1."""
        acp = np.cumprod(1 - betas)
        signal = acp > 0
        recip = 1 / np.where(signal, acp, 1.0)
        acp_prev = np.append(1.0, acp[:-1])
        variance = betas * (1 - acp_prev) / (1 - acp)
        values = {
            "betas": betas,
            "alphas_cumprod": acp,
            "alphas_cumprod_prev": acp_prev,
            "sqrt_alphas_cumprod": np.sqrt(acp),
            "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - acp),
            "log_one_minus_alphas_cumprod": np.log(1 - acp),
            "sqrt_recip_alphas_cumprod": np.sqrt(recip) * signal,
            "sqrt_recipm1_alphas_cumprod": np.sqrt(recip - 1),
            "posterior_variance": variance,
            # The variance is 0 at the first step, whose logarithm would not be finite.
            "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
            "posterior_mean_coef1": betas * np.sqrt(acp_prev) / (1 - acp),
            "posterior_mean_coef2": (1 - acp_prev) * np.sqrt(1 - betas) / (1 - acp),
        }
        return cls(**{name: torch.tensor(value, dtype=torch.float32) for name, value in values.items()})

    @classmethod
    def names(cls) -> list[str]:
        """The names of the fields, which are the checkpoint's buffers."""
        return [field.name for field in fields(cls)]

    def __len__(self) -> int:
        return len(self.betas)

    @property
    def ends_in_noise(self) -> bool:
        """Whether the last step has no signal (zero terminal SNR)."""
        return bool(self.alphas_cumprod[-1] == 0)

    def q_sample(self, x_start: Latent, t: Steps, noise: Latent) -> Latent:
        """x_t ~ q(x_t | x_0) for a given standard normal `noise` (DDPM, eq. 4)."""
        return at(self.sqrt_alphas_cumprod, t) * x_start + at(self.sqrt_one_minus_alphas_cumprod, t) * noise

    def q_posterior(self, x_start: Latent, x_t: Latent, t: Steps) -> tuple[Tensor, Tensor]:
        """Mean and clipped log-variance of q(x_{t-1} | x_t, x_0) (DDPM, eq. 6 and 7)."""
        mean = at(self.posterior_mean_coef1, t) * x_start + at(self.posterior_mean_coef2, t) * x_t
        return mean, at(self.posterior_log_variance_clipped, t)

    def start_from_noise(self, x_t: Latent, t: Steps, noise: Latent) -> Latent:
        """x_0 that `noise` implies: where no signal is left, nothing, for which 0 stands."""
        return at(self.sqrt_recip_alphas_cumprod, t) * x_t - at(self.sqrt_recipm1_alphas_cumprod, t) * noise

    def noise_from_start(self, x_t: Latent, t: Steps, x_start: Latent) -> Latent:
        """The noise that `x_start` implies."""
        numerator = at(self.sqrt_recip_alphas_cumprod, t) * x_t - x_start
        denominator = at(self.sqrt_recipm1_alphas_cumprod, t)
        return torch.where(denominator == 0, x_t, numerator / denominator)  # x_t is the noise where no signal is left

    def velocity(self, x_start: Latent, t: Steps, noise: Latent) -> Latent:
        """v = sqrt(acp) noise - sqrt(1 - acp) x_0 (Salimans & Ho 2022)."""
        return at(self.sqrt_alphas_cumprod, t) * noise - at(self.sqrt_one_minus_alphas_cumprod, t) * x_start

    def start_from_velocity(self, x_t: Latent, t: Steps, v: Latent) -> Latent:
        """x_0 that `v` implies."""
        return at(self.sqrt_alphas_cumprod, t) * x_t - at(self.sqrt_one_minus_alphas_cumprod, t) * v

    def noise_from_velocity(self, x_t: Latent, t: Steps, v: Latent) -> Latent:
        """The noise that `v` implies."""
        return at(self.sqrt_alphas_cumprod, t) * v + at(self.sqrt_one_minus_alphas_cumprod, t) * x_t
