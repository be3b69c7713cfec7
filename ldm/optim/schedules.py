"""Learning rates over time, as `scheduler_config` of a model names them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ldm.errors import ParameterError, nearest
from ldm.util import get_obj_from_str, instantiate_from_config

# From the share of the decay that is left (1 or more before it begins, 0 at its end) to the factor.
SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda left: left,
    "cosine": lambda left: (
        (1 - math.cos(math.pi * min(1.0, left))) / 2
    ),  # Loshchilov & Hutter, 1608.03983, eq. 5
}


class WarmupDecay:
    """A factor for the learning rate: up over `warmup_steps`, then 1, then down to `final`.

    Args:
        steps: training steps in all, by default the run's `max_steps`; later ones have the last
            rate.
        warmup_steps: steps until the full rate.
        decay: the share of `steps`, at the end, over which the rate falls; with 0 it stays.
        final: the factor that it ends at.
        shape: of the fall: linear or cosine.
    """

    def __init__(
        self,
        steps: int | None = None,
        warmup_steps: int = 0,
        decay: float = 1.0,
        final: float = 0.0,
        shape: str = "linear",
    ):
        if steps is None:
            raise ParameterError("steps", "needed where lightning.trainer.max_steps is not given")
        if steps < 1 or not 0 <= warmup_steps < steps or not 0 <= decay <= 1:
            raise ParameterError(
                "steps",
                f"expected steps > warmup_steps >= 0 and 0 <= decay <= 1, got {steps}, "
                f"{warmup_steps} and {decay}",
            )
        if shape not in SHAPES:
            hint = nearest(shape, list(SHAPES))
            raise ParameterError("shape", f"unknown '{shape}'{hint}; accepted: {', '.join(SHAPES)}")
        self.steps, self.warmup_steps, self.decay, self.final = steps, warmup_steps, decay, final
        self.shape = shape  # by name: a checkpoint holds these attributes

    def __call__(self, step: int) -> float:
        """Return the factor of optimizer step `step`, from 0."""
        up = (step + 1) / (self.warmup_steps + 1)
        if self.decay == 0:
            return min(up, 1.0)
        left = max(0.0, 1 - step / self.steps) / self.decay
        return min(up, 1.0, self.final + (1 - self.final) * SHAPES[self.shape](left))

    def __str__(self) -> str:
        """Say how the rate changes, for the start summary."""
        parts = []
        if self.warmup_steps:
            parts.append(f"up over {self.warmup_steps} steps")
        if self.decay:
            first = round((1 - self.decay) * self.steps)
            parts.append(
                f"{self.shape} from step {first} down to {self.final:g} x at step {self.steps}"
            )
        return ", then ".join(parts)


WarmupLinearDecay = WarmupDecay  # as configs name it that are older than the other shapes


def with_schedule(
    optimizer: Optimizer, scheduler_config: Mapping[str, Any] | None, max_steps: int = -1
) -> Any:
    """Return an optimizer for `configure_optimizers`, with a schedule if a config says how.

    Args:
        max_steps: of the run, for a schedule that does not say how many `steps` it is for.
    """
    if scheduler_config is None:
        return optimizer
    given = dict(scheduler_config.get("params") or {})
    target = get_obj_from_str(str(scheduler_config.get("target")), "scheduler_config.target")
    if "steps" in signature(target).parameters and given.get("steps") is None:
        given["steps"] = max_steps if max_steps > 0 else None
    schedule = instantiate_from_config({**scheduler_config, "params": given}, "scheduler_config")
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": LambdaLR(optimizer, schedule), "interval": "step"},
    }
