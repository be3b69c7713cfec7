"""Optimizers that update each parameter during the backward pass and free its gradient at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SUFFIX = "_in_backward"  # of their names in `ldm.optim.registry.OPTIMIZERS`


class InBackward:
    """Update each parameter as soon as its gradient is there, then free the gradient.

    Name it before an optimizer among a class's bases. The numbers and the state are those of that
    optimizer. The gradients of a model are never all there at once, so nothing works that needs
    them all: clipping, accumulated batches, a mean over processes, an inspection of gradients.
    `step` needs the closure that computes the loss and calls `backward`, as Lightning gives it.
    """

    param_groups: list[dict[str, Any]]

    def __init__(self, *args: object, **options: object):
        super().__init__(*args, **options)
        self._stepping = False
        for index, group in enumerate(self.param_groups):
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(
                    lambda p, index=index: self._update(p, index)
                )

    def step(self, closure: Callable[[], object] | None = None) -> Any:
        """Run the closure, during whose backward pass every parameter is updated."""
        assert closure is not None, "the parameters are updated while the closure runs"
        self._stepping = True
        try:
            with torch.enable_grad():
                return closure()
        finally:
            self._stepping = False

    def _update(self, parameter: Tensor, index: int) -> None:
        if not self._stepping:
            return
        groups = self.param_groups
        self.param_groups = [{**groups[index], "params": [parameter]}]
        try:
            super().step()  # type: ignore[misc]
        finally:
            self.param_groups = groups
        parameter.grad = None


class AdamWInBackward(InBackward, torch.optim.AdamW):
    """AdamW in the backward pass."""
