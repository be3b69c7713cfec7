"""Optimizers that update each parameter during the backward pass and free its gradient at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

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
        self._step_one(parameter, index)
        parameter.grad = None

    def _step_one(self, parameter: Tensor, index: int) -> None:
        """Take the optimizer's step of one parameter of the group `index`."""
        groups = self.param_groups
        self.param_groups = [{**groups[index], "params": [parameter]}]
        try:
            super().step()  # type: ignore[misc]
        finally:
            self.param_groups = groups


class AdamWInBackward(InBackward, torch.optim.AdamW):
    """AdamW in the backward pass."""

    def _step_one(self, parameter: Tensor, index: int) -> None:
        group, state = self.param_groups[index], self.state[parameter]
        tensors = [parameter, parameter.grad, state.get("exp_avg"), state.get("exp_avg_sq")]
        # The first step makes the state, and what is rarer is torch's matter.
        if not _is_plain(group, parameter) or not all(_lies_as(t, parameter) for t in tensors):
            super()._step_one(parameter, index)
            return
        # torch's kernel for a CPU copies a gradient whose channels are innermost, and its way to
        # the kernel takes longer than the kernel on a small tensor. Flat views spare both.
        weight, grad, mean, square = ([_flat(tensor)] for tensor in tensors)
        state["step"] += 1
        torch._fused_adamw_(
            *(weight, grad, mean, square, [], [state["step"]]),
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=group["maximize"],
            grad_scale=None,
            found_inf=None,
        )


def _is_plain(group: Mapping[str, Any], parameter: Tensor) -> bool:
    """Return whether a parameter has torch's fused step on a CPU, without its rarer options."""
    rarer = any(group[name] for name in ("amsgrad", "differentiable", "capturable"))
    numbers = all(isinstance(number, float) for number in (group["lr"], *group["betas"]))
    return parameter.device.type == "cpu" and bool(group["fused"]) and numbers and not rarer


def _lies_as(tensor: Tensor | None, parameter: Tensor) -> bool:
    """Return whether a tensor's numbers lie in memory in a parameter's order, without gaps."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor is None:
        return False
    same = tensor.stride() == parameter.stride() and tensor.dtype == parameter.dtype
    return same and _is_dense(tensor)


def _is_dense(tensor: Tensor) -> bool:
    """Return whether some order of the dimensions is contiguous."""
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(order).is_contiguous()


def _flat(tensor: Tensor) -> Tensor:
    """Return a tensor's numbers in the order of its memory."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))
