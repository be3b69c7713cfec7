"""Write tests/data/k_diffusion.npz: what k-diffusion 0.1.1 computes for a mixture of Gaussians.

    pip install --target DIR --no-deps k-diffusion torchsde torchdiffeq trampoline scipy
    PYTHONPATH=.:DIR python tests/support/k_diffusion_numbers.py

The suite needs neither that package nor the many that it imports; only its numbers are kept.
"""

from __future__ import annotations

import importlib
import math
import sys
import types
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

DATA = Path(__file__).parents[1] / "data" / "k_diffusion.npz"
STEPS = (5, 12)
SPREAD = 0.3  # of each Gaussian
WEIGHTS = (0.2, 0.5, 0.3)
NAMES = (
    "euler",
    "euler_ancestral",
    "heun",
    "lms",
    "dpm_2",
    "dpm_2_ancestral",
    "dpmpp_2s_ancestral",
    "dpmpp_sde",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_3m_sde",
)


def start(shape: tuple[int, ...] = (2, 4, 4, 4)) -> Tensor:
    """Return the noise that every run starts from, float64."""
    random = np.random.RandomState(1)
    return torch.from_numpy(random.standard_normal(shape))


def mixture(x: Tensor, sigma: Any, **_: Any) -> Tensor:
    """Return the exact clean latent of data from three Gaussians, given x = x_0 + sigma eps."""
    sigma = float(torch.as_tensor(sigma, dtype=torch.float64).flatten()[0])
    centres = torch.from_numpy(np.random.RandomState(0).standard_normal((3, 1, *x.shape[1:])))
    variance = SPREAD**2 + sigma**2
    logs = [
        math.log(weight) - ((x - centre) ** 2).sum((1, 2, 3)) / (2 * variance)
        for weight, centre in zip(WEIGHTS, centres)
    ]
    shares = torch.softmax(torch.stack(logs), 0)
    parts = [centre + SPREAD**2 / variance * (x - centre) for centre in centres]
    return sum(s.view(-1, 1, 1, 1) * part for s, part in zip(shares, parts))  # type: ignore[return-value]


def noises(shape: tuple[int, ...]) -> Callable[..., Tensor]:
    """Return a source of the same noises in the same order, each time it is made."""
    random = np.random.RandomState(5)
    return lambda *_: torch.from_numpy(random.standard_normal(shape))


class BrownianPath:
    """Noise of one Brownian path for k-diffusion's two draws in a step of its SDE sampler."""

    def __init__(self, shape: tuple[int, ...]):
        self.draw = noises(shape)
        self.first: Tensor | None = None

    def __call__(self, sigma: Any, after: Any) -> Tensor:
        """Return the path's normalised increment; the second draw of a step contains the first."""
        sigma, after = float(sigma), float(after)
        if self.first is None:
            self.first, self.half = self.draw(), after
            return self.first
        first, self.first = self.first, None
        whole = first * math.sqrt(sigma - self.half) + self.draw() * math.sqrt(self.half - after)
        return whole / math.sqrt(sigma - after)


def main() -> None:
    """Compute and write."""
    # The package's __init__ imports a dozen others; its samplers need none of them.
    root = find_spec("k_diffusion")
    assert root is not None and root.submodule_search_locations
    package = types.ModuleType("k_diffusion")
    package.__path__ = list(root.submodule_search_locations)
    sys.modules["k_diffusion"] = package
    sampling = importlib.import_module("k_diffusion.sampling")
    found = {}
    for steps in STEPS:
        sigmas = sampling.get_sigmas_karras(steps, 0.03, 14.6).double()
        found[f"sigmas_{steps}"] = sigmas.numpy()
        for name in NAMES:
            more: dict[str, Any] = {}
            if "ancestral" in name or "sde" in name:
                more["noise_sampler"] = noises((2, 4, 4, 4))
            if name == "dpmpp_sde":
                more["noise_sampler"] = BrownianPath((2, 4, 4, 4))
            if name == "dpmpp_2m_sde":
                more["solver_type"] = "midpoint"
            run = getattr(sampling, f"sample_{name}")
            found[f"{name}_{steps}"] = run(
                mixture, start() * sigmas[0], sigmas, disable=True, **more
            ).numpy()
    np.savez_compressed(DATA, **found)


if __name__ == "__main__":
    main()
