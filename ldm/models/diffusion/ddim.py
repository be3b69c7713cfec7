"""DDIM (Song et al., arXiv 2010.02502)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ldm.models.diffusion.guidance import Denoiser
from ldm.models.diffusion.sampler import Sampler


class DDIMSampler(Sampler):
    """Deterministic with eta 0; with eta 1 its noise is DDPM's."""

    def step(
        self, x: Tensor, index: int, denoise: Denoiser, noise: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor]:
        # What noise and clean latent the model sees in x, and both put together with less noise.
        output = denoise(x, self._batch_of(index, x))
        eps, pred_x0 = self._predictions(x, index, output)
        return self._ddim_update(index, eps, pred_x0, noise), pred_x0
