"""PLMS: pseudo linear multistep sampling (Liu et al., arXiv 2202.09778)."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.models.diffusion.guidance import Denoiser
from ldm.models.diffusion.sampler import Noise, Sampler

# Adams-Bashforth coefficients of the current noise and the ones before it, by how many there are.
# They extrapolate the noise over the coming step, which is more exact than keeping the newest.
MULTISTEP = {
    1: (3 / 2, -1 / 2),
    2: (23 / 12, -16 / 12, 5 / 12),
    3: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


class PLMSSampler(Sampler):
    """Deterministic; one model evaluation a step, two in the first; of fourth order after three."""

    supports_eta = False

    def reset(self) -> None:
        # The noise of earlier steps, latest first.
        self._history: list[Tensor] = []

    def step(self, x: Tensor, index: int, denoise: Denoiser, noise: Noise) -> tuple[Tensor, Tensor]:
        # The model runs once in each step; only the first step runs it again, below.
        eps, pred_x0 = self._predictions(x, index, denoise(x, self._batch_of(index, x)))
        if self.ddim_alphas[index] == 0:
            # From pure noise no x_0 follows from the noise, so the model's own x_0 is taken.
            self._history = [eps]
            return self._ddim_update(index, eps, pred_x0, noise), pred_x0

        # The step is DDIM's, but with a noise that is corrected by earlier ones.
        combined = self._combined(x, index, denoise, noise, eps, pred_x0)
        # Three earlier noises are enough for the fourth order.
        self._history = [eps, *self._history[:2]]
        # x_0 has to follow from the corrected noise (DDPM, eq. 15), or the two would not be of one
        # x_t.
        pred_x0 = self.schedule.start_from_noise(x, self._batch_of(index, x), combined)
        if self.threshold is not None:
            pred_x0 = self.threshold(pred_x0)
        return self._ddim_update(index, combined, pred_x0, noise), pred_x0

    def _combined(
        self,
        x: Tensor,
        index: int,
        denoise: Denoiser,
        noise: Noise,
        eps: Tensor,
        pred_x0: Tensor,
    ) -> Tensor:
        """Return the noise to step with, from this step's and the earlier ones'."""
        # Each earlier noise raises the order by one, until there are three.
        if self._history:
            coefficients = MULTISTEP[len(self._history)]
            terms = [c * e for c, e in zip(coefficients, [eps, *self._history])]
            return torch.stack(terms).sum(dim=0)
        # The first step has no past. Improved Euler takes its place: go one plain step ahead, ask
        # the model there, and use the mean of both noises.
        ahead = self._ddim_update(index, eps, pred_x0, noise)
        # At the last visited step none is before it, so the model is asked for the same one again.
        before = max(index - 1, 0)
        output = denoise(ahead, self._batch_of(before, x))
        eps_ahead, _ = self._predictions(ahead, before, output)
        return (eps + eps_ahead) / 2
