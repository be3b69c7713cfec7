"""AdamW inside the backward pass: no gradient waits for another, so that none of them take memory together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class AdamWInBackward(torch.optim.AdamW):
    """AdamW that updates each parameter as soon as backward has its gradient, and frees the gradient.

    The numbers and the state are those of AdamW. All gradients of a model are never there at once, so nothing that
    needs them all works with it: clipping, accumulated batches, a mean over processes, an inspection of gradients.
    `step` needs the closure that computes the loss and calls `backward`, as Lightning's automatic optimization does.
    """

    def __init__(self, params: Iterable[Any], **options: Any):
        super().__init__(params, **options)
        # For each parameter an optimizer of its own, which works on this one's state and settings.
        self._single = {
            parameter: (index, torch.optim.AdamW([parameter], **options))
            for index, group in enumerate(self.param_groups)
            for parameter in group["params"]
        }
        self._stepping = False
        for parameter in self._single:
            parameter.register_post_accumulate_grad_hook(self._update)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Run the closure, during whose backward pass every parameter is updated."""
        assert closure is not None, "the parameters are updated while the closure runs"
        self._stepping = True
        try:
            with torch.enable_grad():
                return closure()
        finally:
            self._stepping = False

    def _update(self, parameter: Tensor) -> None:
        if not self._stepping:
            return
        index, single = self._single[parameter]
        single.state = self.state
        single.param_groups = [{**self.param_groups[index], "params": [parameter]}]
        single.step()
        parameter.grad = None
