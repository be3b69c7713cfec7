"""DDIM (Song et al., arXiv 2010.02502)."""

from __future__ import annotations

from torch import Tensor

from ldm.models.diffusion.guidance import Denoiser
from ldm.models.diffusion.sampler import Noise, Sampler


class DDIMSampler(Sampler):
    """Deterministic with eta 0; with eta 1 its noise is DDPM's."""

    def step(self, x: Tensor, index: int, denoise: Denoiser, noise: Noise) -> tuple[Tensor, Tensor]:
        # The model's output says what in x_t is noise, and so what x_0 is (DDIM, eq. 9).
        output = denoise(x, self._batch_of(index, x))
        eps, pred_x0 = self._predictions(x, index, output)

        # Both are put together again with the smaller noise of the step before (DDIM, eq. 12).
        return self._ddim_update(index, eps, pred_x0, noise), pred_x0
