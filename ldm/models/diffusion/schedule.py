"""The forward process: how much signal and noise there is at each time step (Ho et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ldm.errors import ParameterError
from ldm.modules.diffusionmodules.util import extract_into_tensor, make_beta_schedule

Latent = Float[Tensor, "b c h w"]
Steps = Int[Tensor, " b"]


def with_zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Return betas after which no signal is left, the first step's as it was.

    Lin et al., 2305.08891, algorithm 1.
    """
    root = np.sqrt(np.cumprod(1 - betas))
    # Moved, so that the last is 0, and scaled, so that the first stays.
    moved = root - root[-1]
    acp = (moved * root[0] / (root[0] - root[-1])) ** 2
    # A step's alpha is the ratio of successive cumulative products.
    return 1 - acp / np.append(1.0, acp[:-1])


def at(values: Float[Tensor, " T"], t: Steps) -> Float[Tensor, "b 1 1 1"]:
    """Return the entries of a schedule at time steps `t`, shaped to multiply a batch of latents."""
    return extract_into_tensor(values, t, (len(t), 1, 1, 1))


@dataclass(frozen=True)
class NoiseSchedule:
    """Every quantity of the forward process that is a function of the time step alone, each (T,).

    The field names are the buffers of a CompVis checkpoint; the comments give DDPM's symbols. All
    are computed in float64, then cast to float32. Where no signal is left (zero terminal SNR), the
    two reciprocals are 0 instead of infinite.
    """

    # beta_t, the variance of the noise that step t adds, and what is left of the signal's variance
    # after t steps and after the step before. `acp` is short for the latter.
    betas: Tensor
    alphas_cumprod: Tensor
    alphas_cumprod_prev: Tensor
    # The factors of signal and noise in x_t (eq. 4).
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    log_one_minus_alphas_cumprod: Tensor
    # The factors of x_t and noise in x_0, which is eq. 4 solved for it.
    sqrt_recip_alphas_cumprod: Tensor
    sqrt_recipm1_alphas_cumprod: Tensor
    # The posterior q(x_{t-1} | x_t, x_0): its variance, and the factors of x_0 and x_t in its mean
    # (eq. 7).
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
        """Make a schedule of `timesteps` steps; with `zero_terminal_snr` the last is noise alone.

        Raises:
            UserError: an unknown `beta_schedule`, betas that leave (0, 1), or a noise that falls.
        """
        if linear_start > linear_end:
            raise ParameterError(
                "linear_start", f"{linear_start} is above linear_end {linear_end}; exchange them"
            )
        betas = np.empty(0)
        if timesteps > 0 and min(linear_start, linear_end) > 0:
            # The schedule `linear` takes roots of its ends. Other values are refused below.
            betas = make_beta_schedule(beta_schedule, timesteps, linear_start, linear_end, cosine_s)
        if not (betas.size and (betas > 0).all() and (betas < 1).all()):
            raise ParameterError(
                "timesteps",
                f"{timesteps}, with linear_start {linear_start} and linear_end {linear_end}, "
                "gives betas outside (0, 1)",
            )
        if zero_terminal_snr and timesteps < 2:
            raise ParameterError("zero_terminal_snr", f"needs 2 timesteps or more, got {timesteps}")
        # Stable Diffusion's last step keeps some signal, from which training learns an image's mean
        # brightness; sampling from pure noise then lacks it (Lin et al., 2305.08891).
        if zero_terminal_snr:
            betas = with_zero_terminal_snr(betas)
        return cls.of_betas(betas)

    @classmethod
    def of_betas(cls, betas: np.ndarray) -> NoiseSchedule:
        """Make the schedule of betas in (0, 1), of which the last may be 1."""
        acp = np.cumprod(1 - betas)
        # Before the first step all is signal.
        acp_prev = np.append(1.0, acp[:-1])
        # Where no signal is left, x_0 does not follow from x_t: factors of 0 instead of infinity.
        signal = acp > 0
        recip = 1 / np.where(signal, acp, 1.0)
        # The posterior's variance (DDPM, eq. 7), which the reverse process uses for its own.
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
            # The two factors of the posterior's mean (DDPM, eq. 7).
            "posterior_mean_coef1": betas * np.sqrt(acp_prev) / (1 - acp),
            "posterior_mean_coef2": (1 - acp_prev) * np.sqrt(1 - betas) / (1 - acp),
        }
        buffers = {name: torch.tensor(value, dtype=torch.float32) for name, value in values.items()}
        return cls(**buffers)

    @classmethod
    def names(cls) -> list[str]:
        """Return the names of the fields, which are the checkpoint's buffers."""
        return [field.name for field in fields(cls)]

    def __len__(self) -> int:
        return len(self.betas)

    @property
    def ends_in_noise(self) -> bool:
        """Return whether the last step has no signal (zero terminal SNR)."""
        return bool(self.alphas_cumprod[-1] == 0)

    def q_sample(self, x_start: Latent, t: Steps, noise: Latent) -> Latent:
        """Return x_t ~ q(x_t | x_0) for a given standard normal `noise` (DDPM, eq. 4)."""
        signal = at(self.sqrt_alphas_cumprod, t) * x_start
        return signal + at(self.sqrt_one_minus_alphas_cumprod, t) * noise

    def q_posterior(self, x_start: Latent, x_t: Latent, t: Steps) -> tuple[Tensor, Tensor]:
        """Return mean and clipped log-variance of q(x_{t-1} | x_t, x_0) (DDPM, eq. 6 and 7)."""
        of_start = at(self.posterior_mean_coef1, t) * x_start
        mean = of_start + at(self.posterior_mean_coef2, t) * x_t
        return mean, at(self.posterior_log_variance_clipped, t)

    def start_from_noise(self, x_t: Latent, t: Steps, noise: Latent) -> Latent:
        """Return the x_0 that `noise` implies, or 0 where no signal is left."""
        scaled = at(self.sqrt_recip_alphas_cumprod, t) * x_t
        return scaled - at(self.sqrt_recipm1_alphas_cumprod, t) * noise

    def noise_from_start(self, x_t: Latent, t: Steps, x_start: Latent) -> Latent:
        """Return the noise that `x_start` implies."""
        numerator = at(self.sqrt_recip_alphas_cumprod, t) * x_t - x_start
        denominator = at(self.sqrt_recipm1_alphas_cumprod, t)
        # Where no signal is left, x_t is the noise.
        return torch.where(denominator == 0, x_t, numerator / denominator)

    def velocity(self, x_start: Latent, t: Steps, noise: Latent) -> Latent:
        """Return v = sqrt(acp) noise - sqrt(1 - acp) x_0 (Salimans & Ho 2022)."""
        turned = at(self.sqrt_alphas_cumprod, t) * noise
        return turned - at(self.sqrt_one_minus_alphas_cumprod, t) * x_start

    # Noise and x_0 are x_t and v, turned by the angle whose cosine is sqrt(acp).

    def start_from_velocity(self, x_t: Latent, t: Steps, v: Latent) -> Latent:
        """Return the x_0 that `v` implies."""
        turned = at(self.sqrt_alphas_cumprod, t) * x_t
        return turned - at(self.sqrt_one_minus_alphas_cumprod, t) * v

    def noise_from_velocity(self, x_t: Latent, t: Steps, v: Latent) -> Latent:
        """Return the noise that `v` implies."""
        turned = at(self.sqrt_alphas_cumprod, t) * v
        return turned + at(self.sqrt_one_minus_alphas_cumprod, t) * x_t
