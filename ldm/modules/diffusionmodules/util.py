"""Small pieces of networks and schedules, under the names that scripts of the LDM family import."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from ldm.errors import ParameterError, UserError

# Noise schedules, in float64: their errors would add up over a thousand steps.


def make_beta_schedule(
    schedule: str,
    n_timestep: int,
    linear_start: float = 1e-4,
    linear_end: float = 2e-2,
    cosine_s: float = 8e-3,
) -> np.ndarray:
    """Return the noise added at each step; Stable Diffusion's `linear` is linear in sqrt(beta).

    Raises:
        UserError: an unknown `schedule`.
    """
    if schedule == "linear":
        ends = linear_start**0.5, linear_end**0.5
        return np.linspace(*ends, n_timestep, dtype=np.float64) ** 2
    if schedule == "sqrt_linear":
        return np.linspace(linear_start, linear_end, n_timestep, dtype=np.float64)
    if schedule == "cosine":
        # Nichol & Dhariwal 2021, eq. 17
        steps = np.arange(n_timestep + 1, dtype=np.float64) / n_timestep + cosine_s
        alphas_cumprod = np.cos(steps / (1 + cosine_s) * np.pi / 2) ** 2
        return np.clip(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], 0, 0.999)
    problem = f"unknown '{schedule}'; accepted: linear, sqrt_linear, cosine"
    raise ParameterError("beta_schedule", problem)


def make_ddim_timesteps(
    ddim_discr_method: str,
    num_ddim_timesteps: int,
    num_ddpm_timesteps: int,
    verbose: bool = False,
) -> np.ndarray:
    """Return evenly spaced time steps, ascending, as many as asked for (DDIM, appendix D.3).

    They start at 1, as Stable Diffusion's do (10 of 1000: 1, 101, ..., 901), or at 0 when all are
    visited.

    Raises:
        UserError: a method other than `uniform`, or more steps than there are.
    """
    if ddim_discr_method != "uniform":
        problem = f"unknown '{ddim_discr_method}'; accepted: uniform"
        raise ParameterError("ddim_discretize", problem)
    check_steps(num_ddim_timesteps, num_ddpm_timesteps)
    first = 1 if num_ddim_timesteps < num_ddpm_timesteps else 0
    return np.arange(num_ddim_timesteps) * num_ddpm_timesteps // num_ddim_timesteps + first


def check_steps(steps: int, total: int) -> None:
    """Raise a `UserError` if a schedule of `total` time steps cannot be visited in so many."""
    if not 1 <= steps <= total:
        raise UserError(f"sampling steps must be between 1 and {total}, got {steps}")


def make_ddim_sampling_parameters(
    alphacums: np.ndarray, ddim_timesteps: np.ndarray, eta: float, verbose: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return sigma, alpha and the alpha before of each visited time step (DDIM, eq. 16).

    Args:
        alphacums: of all time steps.
        ddim_timesteps: the visited ones, ascending.
        eta: 0 deterministic, 1 as random as DDPM.
    """
    a = alphacums[ddim_timesteps]
    a_prev = np.append(alphacums[:1], a[:-1])
    sigmas = eta * np.sqrt((1 - a_prev) / (1 - a) * (1 - a / a_prev))
    return sigmas, a, a_prev


def extract_into_tensor(a: Shaped[Tensor, " T"], t: Tensor, x_shape: Sequence[int]) -> Tensor:
    """Return a schedule's entries at time steps `t`, shaped to multiply a batch of `x_shape`."""
    return a[t].reshape(len(t), *(1 for _ in x_shape[1:]))


def noise_like(shape: Sequence[int], device: torch.device | str, repeat: bool = False) -> Tensor:
    """Return standard normal noise, with `repeat` the same for every sample."""
    drawn = (1, *shape[1:]) if repeat else tuple(shape)
    return torch.randn(drawn, device=device).expand(*shape)


# Networks


def timestep_embedding(
    timesteps: Float[Tensor, " b"] | Tensor,
    dim: int,
    max_period: float = 10000.0,
    repeat_only: bool = False,
) -> Float[Tensor, "b dim"]:
    """Return an embedding of time steps: `dim / 2` cosines, then as many sines, in float32.

    Frequencies fall geometrically from 1 to `1 / max_period` (Vaswani et al., section 3.5). With
    `repeat_only` the time steps themselves are repeated instead.
    """
    if repeat_only:
        return timesteps[:, None].float().repeat(1, dim)
    half = dim // 2
    # In this order: a rounding of the frequency is multiplied by up to a thousand steps.
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    exponents = -math.log(max_period) * exponents / half
    angles = timesteps[:, None].float() * torch.exp(exponents)
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return nn.functional.pad(embedding, (0, dim % 2))


def zero_module(module: nn.Module) -> nn.Module:
    """Set all parameters of a module to zero, so that a residual branch starts as the identity."""
    for parameter in module.parameters():
        # Not `zeros_`: where a checkpoint fills the model, this is skipped (`EmptyInit`).
        nn.init.constant_(parameter, 0.0)
    return module
