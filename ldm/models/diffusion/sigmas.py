"""Noise levels in Karras's notation, and the schedules of them (Karras et al., 2206.00364).

A latent x_t = sqrt(acp) x_0 + sqrt(1 - acp) eps, divided by sqrt(acp), is x_0 + sigma eps with
sigma = sqrt((1 - acp) / acp). The samplers of `sigma_sampler.py` work on that.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ldm.errors import UserError, nearest
from ldm.models.diffusion.schedule import NoiseSchedule

# Of noise alone (zero terminal SNR) sigma would be infinite.
LARGEST = 4500.0

# Noise levels for 10 steps of Stable Diffusion 1 (Sabour et al., 2404.14507, "Align Your Steps").
ALIGN_YOUR_STEPS = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)


@dataclass(frozen=True)
class NoiseLevels:
    """The sigma of every time step of a model, ascending, float64, and the way between the two."""

    values: np.ndarray

    @classmethod
    def of(cls, schedule: NoiseSchedule) -> NoiseLevels:
        """Return the noise levels of a schedule. The one of noise alone is cut at `LARGEST`."""
        acp = schedule.alphas_cumprod.detach().cpu().double().numpy()
        acp = np.maximum(acp, 1 / (1 + LARGEST**2))
        return cls(np.sqrt((1 - acp) / acp))

    @property
    def smallest(self) -> float:
        """Return the sigma of the first time step."""
        return float(self.values[0])

    @property
    def largest(self) -> float:
        """Return the sigma of the last time step."""
        return float(self.values[-1])

    def timestep(self, sigma: float) -> float:
        """Return the time step of a sigma, between two of the schedule's by the logarithm."""
        # The logarithm of sigma is close to linear in t over most of the schedule.
        return float(np.interp(math.log(sigma), np.log(self.values), np.arange(len(self.values))))

    def sigma(self, timestep: float | np.ndarray) -> np.ndarray:
        """Return the sigma of a time step, which may lie between two of the schedule's."""
        logs = np.interp(timestep, np.arange(len(self.values)), np.log(self.values))
        return np.asarray(np.exp(logs))


# A schedule gives the noise levels of `steps` steps, descending, without the final 0.
Schedule = Callable[[NoiseLevels, int], np.ndarray]


def normal(levels: NoiseLevels, steps: int) -> np.ndarray:
    """Space the time steps evenly, from the last to the first."""
    return levels.sigma(np.linspace(len(levels.values) - 1, 0, steps))


def sgm_uniform(levels: NoiseLevels, steps: int) -> np.ndarray:
    """Space the time steps evenly from the last one, and leave the first out (trailing)."""
    return levels.sigma(np.linspace(len(levels.values) - 1, 0, steps + 1)[:-1])


def simple(levels: NoiseLevels, steps: int) -> np.ndarray:
    """Take every n-th noise level of the model's, from the largest."""
    total = len(levels.values)
    return levels.values[total - 1 - np.arange(steps) * total // steps]


def ddim_uniform(levels: NoiseLevels, steps: int) -> np.ndarray:
    """Visit the time steps of our DDIM sampler: 1, 101, ..., 901 for 10 of 1000."""
    total = len(levels.values)
    offset = 1 if steps < total else 0
    return levels.values[np.arange(steps)[::-1] * total // steps + offset]


def karras(levels: NoiseLevels, steps: int, rho: float = 7.0) -> np.ndarray:
    """Space the noise levels evenly in sigma^(1/rho) (Karras et al. 2022)."""
    # Eq. 5. A larger rho puts more of the steps at small noise, where details are made.
    ramp = np.linspace(0, 1, steps)
    first, last = levels.largest ** (1 / rho), levels.smallest ** (1 / rho)
    return (first + ramp * (last - first)) ** rho


def exponential(levels: NoiseLevels, steps: int) -> np.ndarray:
    """Space the noise levels evenly in log(sigma)."""
    return np.exp(np.linspace(math.log(levels.largest), math.log(levels.smallest), steps))


def beta(levels: NoiseLevels, steps: int, shape: float = 0.6) -> np.ndarray:
    """Place the time steps at quantiles of a beta distribution: dense at both ends (2407.12173)."""
    quantiles = beta_quantiles(1 - np.arange(steps) / steps, shape)
    return levels.sigma(quantiles * (len(levels.values) - 1))


def beta_quantiles(share: np.ndarray, shape: float) -> np.ndarray:
    """Return the quantiles of the beta distribution whose two parameters are both `shape` <= 1."""
    # With u = x^shape the density x^(shape-1) (1-x)^(shape-1) dx is smooth at 0; the rest
    # follows from the symmetry.
    u = np.linspace(0, 0.5**shape, 20001)
    density = (1 - u ** (1 / shape)) ** (shape - 1)
    # The distribution's function up to 1/2 by the trapezoid rule; half of all lies below.
    steps = (density[1:] + density[:-1]) / 2 * np.diff(u)
    lower = np.concatenate([[0], np.cumsum(steps)])
    lower *= 0.5 / lower[-1]
    # Read the function backwards, and turn u into x again.
    below = np.interp(np.minimum(share, 1 - share), lower, u) ** (1 / shape)
    return np.where(share <= 0.5, below, 1 - below)


def align_your_steps(levels: NoiseLevels, steps: int) -> np.ndarray:
    """Interpolate the published noise levels, evenly in log(sigma), and keep them in range."""
    # The published levels were made for 10 steps. Other numbers follow the same curve.
    published = np.log(np.array(ALIGN_YOUR_STEPS))
    ramp = np.linspace(0, 1, steps + 1)
    wanted = np.exp(np.interp(ramp, np.linspace(0, 1, len(published)), published))[:-1]
    return np.clip(wanted, levels.smallest, levels.largest)


SCHEDULES: dict[str, Schedule] = {
    "normal": normal,
    "karras": karras,
    "exponential": exponential,
    "sgm_uniform": sgm_uniform,
    "simple": simple,
    "beta": beta,
    "ddim_uniform": ddim_uniform,
    "align_your_steps": align_your_steps,
}


def noise_levels(schedule: str, levels: NoiseLevels, steps: int) -> list[float]:
    """Return the noise levels of `steps` steps, descending, and the final 0.

    Raises:
        UserError: an unknown schedule, or more steps than the model has, or none.
    """
    if schedule not in SCHEDULES:
        raise UserError(
            f"schedule: unknown '{schedule}'{nearest(schedule, list(SCHEDULES))}; "
            f"accepted: {', '.join(SCHEDULES)}"
        )
    total = len(levels.values)
    if not 1 <= steps <= total:
        raise UserError(f"sampling steps must be between 1 and {total}, got {steps}")
    return [*SCHEDULES[schedule](levels, steps).tolist(), 0.0]


def scaled_to_model(x: Tensor, sigma: float) -> Tensor:
    """Return the model's x_t of x_0 + sigma eps."""
    return x / math.sqrt(1 + sigma**2)


def clean_latent(parameterization: str, x: Tensor, sigma: float, output: Tensor) -> Tensor:
    """Return the x_0 that a model's output at x = x_0 + sigma eps stands for.

    Args:
        parameterization: what the output is: `eps`, `x0` or `v` (Salimans & Ho 2022).
    """
    # x = x_0 + sigma eps, solved for x_0.
    if parameterization == "eps":
        return x - sigma * output
    # x_0 = sqrt(acp) x_t - sqrt(1 - acp) v, with x_t and acp in terms of sigma.
    if parameterization == "v":
        return x / (1 + sigma**2) - output * (sigma / math.sqrt(1 + sigma**2))
    return output


def output_slope(parameterization: str, sigma: float) -> float:
    """Return how much a model's output changes with the x_0 that it stands for, at a given x_t."""
    # The inverse of the derivative of `clean_latent` by the output.
    if parameterization == "eps":
        return -1 / sigma
    if parameterization == "v":
        return -math.sqrt(1 + sigma**2) / sigma
    return 1.0


def batch_of(timestep: float, like: Tensor) -> Tensor:
    """Return a time step for each sample of a batch; a whole one as int64, as training has it."""
    if timestep.is_integer():
        return torch.full((len(like),), int(timestep), device=like.device)
    return torch.full((len(like),), timestep, device=like.device)


def check_descending(sigmas: Sequence[float]) -> None:
    """Raise a `UserError` if a schedule has two steps at one noise level or rises."""
    for before, after in itertools.pairwise(sigmas):
        if not after < before:
            raise UserError(f"schedule: noise levels must fall, got {before:g} and then {after:g}")
