"""What a super-resolution model reads of a small image: with noise, whose level it is told.

Noise-conditioning augmentation (Ho et al., 2106.15282; Imagen, 2205.11487, section 2.5). A model
that saw clean small images alone would trust every pixel of the imperfect ones that it gets from
another model. Names and keys are Stable Diffusion 2's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ldm.errors import ParameterError, under
from ldm.modules.diffusionmodules.util import extract_into_tensor, make_beta_schedule
from ldm.util import check_params

Images = Float[Tensor, "b c h w"]
Levels = Int[Tensor, " b"]

# The buffers of a checkpoint, in its order.
SCHEDULE = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
)


class ImageConcatWithNoiseAugmentation(nn.Module):
    """Adds noise of a level to small images; a level is a time step of a noise schedule.

    Args:
        noise_schedule_config: of the levels: `beta_schedule`, `timesteps`, `linear_start`,
            `linear_end` and `cosine_s`, as of a model.
        max_noise_level: a training draws levels below it.
        to_cuda: accepted for SD 2's files, without effect.
    """

    config_keys = SCHEDULE
    betas: Tensor
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor

    def __init__(
        self,
        noise_schedule_config: Mapping[str, Any] | None = None,
        max_noise_level: int = 1000,
        to_cuda: bool = False,
    ):
        super().__init__()
        given = dict(noise_schedule_config or {})
        check_params(_schedule, given, "noise_schedule_config")
        with under("noise_schedule_config"):
            schedule = _schedule(**given)
        for name, values in schedule.items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32))
        self._variances = 1 - schedule["alphas_cumprod"]  # of each level's noise
        levels = len(schedule["betas"])
        if not 1 <= max_noise_level <= levels:
            problem = f"expected a number from 1 to {levels}, got {max_noise_level}"
            raise ParameterError("max_noise_level", problem)
        self.max_noise_level = max_noise_level

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load a state; raise a `UserError` for another schedule, whose levels mean other noise."""
        betas = state_dict.get(f"{prefix}betas")
        is_known = betas is not None and not betas.is_meta and not self.betas.is_meta
        if (
            betas is not None
            and is_known
            and not torch.allclose(betas.cpu().float(), self.betas.cpu(), rtol=1e-2)
        ):
            problem = "is not that of the weights: give the config that they were made with"
            raise ParameterError("low_scale_config.params.noise_schedule_config", problem)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def q_sample(self, x_start: Images, t: Levels, noise: Tensor | None = None) -> Images:
        """Return images with the noise of their levels (DDPM, eq. 4)."""
        noise = torch.randn_like(x_start) if noise is None else noise
        signal = extract_into_tensor(self.sqrt_alphas_cumprod, t, x_start.shape) * x_start
        scale = extract_into_tensor(self.sqrt_one_minus_alphas_cumprod, t, x_start.shape)
        return signal + scale * noise

    def forward(
        self, x: Images, noise_level: Levels | None = None, noise: Tensor | None = None
    ) -> tuple[Images, Levels]:
        """Return noisy images and their levels, which are drawn where none are given."""
        if noise_level is None:
            noise_level = torch.randint(self.max_noise_level, (len(x),), device=x.device)
        return self.q_sample(x, noise_level, noise), noise_level

    def level_of(self, variance: float) -> int:
        """Return the level whose noise has about this variance.

        Raises:
            UserError: no level has so much or so little.
        """
        low, high = self._variances[0], self._variances[-1]
        # Half of the least variance rounds up to it, and so on at the other end.
        if not low / 2 <= variance <= high:
            raise ParameterError(
                "noise_augmentation",
                f"expected a variance from {low:.3g} to {high:.3g}, got {variance:g}",
            )
        # Variances span many powers of ten, so the nearest is that of the nearest logarithm.
        return int(np.abs(np.log(self._variances) - np.log(variance)).argmin())


def _schedule(
    beta_schedule: str = "linear",
    timesteps: int = 1000,
    linear_start: float = 1e-4,
    linear_end: float = 2e-2,
    cosine_s: float = 8e-3,
) -> dict[str, np.ndarray]:
    """Return the levels' quantities by their buffers' names."""
    betas = np.empty(0)
    if timesteps > 0 and 0 < linear_start <= linear_end:
        betas = make_beta_schedule(beta_schedule, timesteps, linear_start, linear_end, cosine_s)
    if not (betas.size and (betas > 0).all() and (betas < 1).all()):
        problem = f"{linear_start} to linear_end {linear_end} gives no betas between 0 and 1"
        raise ParameterError("linear_start", problem)
    acp = np.cumprod(1 - betas)
    values = (
        betas,
        acp,
        np.append(1.0, acp[:-1]),
        np.sqrt(acp),
        np.sqrt(1 - acp),
        np.log(1 - acp),
        np.sqrt(1 / acp),
        np.sqrt(1 / acp - 1),
    )
    return dict(zip(SCHEDULE, values))
