"""In which precision pictures are drawn: float32, autocast, or half precision all through."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from ldm.errors import UserError

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion

PRECISIONS = ("full", "autocast", "half")


def half_of(device: torch.device) -> torch.dtype:
    """Return the half precision of a device: float16 on a GPU, bfloat16 on a CPU."""
    return torch.bfloat16 if device.type == "cpu" else torch.float16


def dtype_of_weights(device: torch.device, precision: str) -> torch.dtype | None:
    """Return the precision in which matrices and convolutions are read; None is float32."""
    # Under autocast a GPU would make half-precision copies of the weights anyway.
    if precision == "half" or (precision == "autocast" and device.type != "cpu"):
        return half_of(device)
    return None


def halve(model: LatentDiffusion, dtype: torch.dtype | None = None) -> LatentDiffusion:
    """Put all three networks into half precision, in place, and return the model.

    Norms, softmax and sums are computed in float32 inside their kernels. The noise schedule and
    the sampler's arithmetic stay in float32.

    Args:
        dtype: float16 or bfloat16; by default that of the model's device.
    """
    # The buffers of the noise schedule are the model's own, so they stay in float32.
    dtype = dtype or half_of(model.device)
    for network in (model.model, model.cond_stage_model, model.first_stage_model):
        network.to(dtype)
    return model


def is_halved(model: LatentDiffusion) -> bool:
    """Return whether a model's weights are in half precision all through, its norms, too."""
    return all(p.dtype != torch.float32 for p in model.model.diffusion_model.parameters())


def computing_in(model: LatentDiffusion, precision: str) -> AbstractContextManager[Any]:
    """Return the context in which a model computes in a precision.

    `full` is float32. `autocast` is float16 on a GPU; a CPU, where it would be slower, stays with
    float32. `half` is what the weights are in after `halve`.

    Raises:
        UserError: another name, or `half` for a model that is not halved.
    """
    if precision not in PRECISIONS:
        raise UserError(f"--precision {precision}: accepted: {', '.join(PRECISIONS)}")
    # Full weights would compute in float32, and the picture would say that it is of half.
    if precision == "half" and not is_halved(model):
        raise UserError("--precision half: the weights are in float32; call halve(model) before")
    if precision == "autocast" and model.device.type != "cpu":
        return torch.autocast(model.device.type, torch.float16)
    return nullcontext()
