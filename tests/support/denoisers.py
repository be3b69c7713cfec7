"""Models whose exact sample is known, for every sampler."""

import math
from typing import Any

import torch
from torch import Tensor

from ldm.models.diffusion.parameterization import PARAMETERIZATIONS
from ldm.models.diffusion.sampler_names import SAMPLERS
from ldm.models.diffusion.schedule import NoiseSchedule, at
from ldm.models.diffusion.sigmas import NoiseLevels
from ldm.models.diffusion.thresholding import Threshold
from ldm.rng import SampleRandom

SHAPE = (2, 4, 4)
FEW = 40  # time steps, for a sampler that visits all of them


class Gaussian:
    """The best denoiser of data ~ N(mean, std), elementwise; the conditioning holds each sample's
    mean.

    With std 0 all data are one point, which every prediction is.
    """

    def __init__(self, parameterization: str = "eps", std: float = 0.0, timesteps: int = 1000):
        self.schedule = NoiseSchedule.create(timesteps, "linear", 0.00085, 0.012)
        self.parameterization = parameterization
        self.std = std
        self.threshold: Threshold | None = None
        self.steps: list[int] = []  # of every call
        self.conds: list[Any] = []

    def apply_model(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        assert len(x) == len(t) and (t == t[0]).all()
        self.steps.append(int(t[0]))
        self.conds.append(cond)
        mean = self.mean(cond)
        assert len(mean) == len(x)
        acp = at(self.schedule.alphas_cumprod, t)
        gain = acp.sqrt() * self.std**2 / (acp * self.std**2 + 1 - acp)
        start = mean + gain * (x - acp.sqrt() * mean)
        noise = self.schedule.noise_from_start(x, t, start)
        return PARAMETERIZATIONS[self.parameterization].target(self.schedule, start, t, noise)

    @staticmethod
    def mean(cond: Any) -> Tensor:
        """Return the data's mean, of a conditioning of any form."""
        if isinstance(cond, dict):
            cond = cond["c_crossattn"]
        if isinstance(cond, list):
            (cond,) = cond
        return cond.reshape(len(cond), 1, 1, 1)


def means(*values: float) -> Tensor:
    """Make a conditioning of samples whose data have these means."""
    return torch.tensor(values).reshape(-1, 1, 1)


def fake(name: str, *args: Any, **kwargs: Any) -> Gaussian:
    """Make a model for a sampler: with few time steps, where it visits all of them."""
    return Gaussian(*args, timesteps=FEW if name == "ddpm" else 1000, **kwargs)


def count(name: str, steps: int) -> int:
    """Return `steps`, or the only number that the sampler can do with its `fake` model."""
    return FEW if name == "ddpm" else steps


def draw(name: str, model: Any, cond: Any, steps: int = 10, **kwargs: Any) -> tuple[Tensor, dict]:
    """Sample with the sampler of a name."""
    sampler, samples = SAMPLERS[name](model), len(Gaussian.mean(cond))
    return sampler.sample(count(name, steps), samples, SHAPE, cond, verbose=False, **kwargs)


def noise_of(batch: int = 2, seed: int = 0) -> Tensor:
    """Return noise to start from."""
    return SampleRandom(range(seed, seed + batch)).randn((batch, *SHAPE))


def noisy(name: str) -> dict[str, float]:
    """Return the options with which a sampler draws noise in its steps."""
    return {"eta": 1.0} if SAMPLERS[name].supports_eta else {}


class AnyTime(Gaussian):
    """The same denoiser at time steps that may lie between two, for samplers over noise levels."""

    def __init__(self, parameterization: str = "eps", std: float = 0.5, timesteps: int = 1000):
        super().__init__(parameterization, std, timesteps)
        self.levels = NoiseLevels.of(self.schedule)
        self.sizes: list[int] = []  # of the batch of every call

    def apply_model(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        self.sizes.append(len(x))
        sigma = float(self.levels.sigma(float(t[0])))
        noisy, mean = x * math.sqrt(1 + sigma**2), self.mean(cond)
        start = mean + self.std**2 / (self.std**2 + sigma**2) * (noisy - mean)
        eps = (noisy - start) / sigma
        v = (eps - sigma * start) / math.sqrt(1 + sigma**2)
        return {"eps": eps, "v": v, "x0": start}[self.parameterization]
