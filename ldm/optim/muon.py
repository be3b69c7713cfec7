"""Muon (Jordan et al. 2024)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


@torch.no_grad()
def orthogonalized(update: Float[Tensor, "m n"], steps: int = 5) -> Float[Tensor, "m n"]:
    """Return about the nearest matrix with orthonormal rows or columns (Jordan, 2024).

    Each step of the Newton-Schulz iteration multiplies x by a polynomial in x x^T. The product of
    the polynomials is found with small square matrices alone, and multiplied by the long x once.
    """
    a, b, c = NS_COEFFICIENTS
    tall = update.shape[0] > update.shape[1]
    x = update.T if tall else update
    x = x / (x.norm() + 1e-7)
    gram = x @ x.T
    product = identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for _ in range(steps):
        factor = torch.addmm(b * gram + a * identity, gram, gram, alpha=c)
        product = factor @ product
        gram = factor @ gram @ factor
    x = product @ x
    return x.T if tall else x


class Muon(Optimizer):
    """Muon for hidden weight matrices and convolutions, AdamW for all else, in one optimizer.

    torch.optim.Muon takes matrices only, neither convolutions nor the other parameters. Updates are
    scaled to AdamW's size, `0.2 sqrt(max(m, n))` (Liu et al., 2502.16982), so that one learning
    rate serves both.

    Args:
        params: parameter groups, each with `muon: bool`; see `muon_groups`.
        lr: the learning rate.
        momentum: Muon's, of Nesterov's kind.
        betas, eps: AdamW's.
        weight_decay: decoupled, for both.
    """

    def __init__(
        self,
        params: Iterable[dict[str, object]],
        lr: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, {**defaults, "muon": False})

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """Update every parameter that has a gradient, once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            update = self._muon if group["muon"] else self._adam
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    update(parameter, parameter.grad, self.state[parameter], group)
        return loss

    @staticmethod
    def _muon(
        parameter: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]
    ) -> None:
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(grad, 1 - group["momentum"])
        update = grad.lerp(state["momentum"], group["momentum"]).flatten(1)
        scale = 0.2 * max(update.shape) ** 0.5
        parameter.add_(orthogonalized(update).reshape(parameter.shape), alpha=-group["lr"] * scale)

    @staticmethod
    def _adam(
        parameter: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]
    ) -> None:
        if not state:
            state.update(
                step=torch.zeros(()),
                mean=torch.zeros_like(parameter),
                square=torch.zeros_like(parameter),
            )
        state["step"] += 1
        beta1, beta2 = group["betas"]
        state["mean"].lerp_(grad, 1 - beta1)
        state["square"].lerp_(grad.square(), 1 - beta2)
        step = state["step"].item()
        deviation = (state["square"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
        parameter.addcdiv_(state["mean"], deviation, value=-group["lr"] / (1 - beta1**step))


def muon_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Share a module's trained parameters out: hidden matrices to Muon, all others to AdamW.

    The others are embeddings, norms, biases, and convolutions from or to few channels (pixels,
    latents), whose gradients have few directions.
    """
    embeddings = {
        id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()
    }
    groups: tuple[list[Tensor], list[Tensor]] = ([], [])
    for parameter in module.parameters():
        if parameter.requires_grad:
            hidden = (
                parameter.ndim >= 2
                and min(parameter.shape[:2]) >= 16
                and id(parameter) not in embeddings
            )
            groups[hidden].append(parameter)
    return [
        {"params": parameters, "muon": bool(k)} for k, parameters in enumerate(groups) if parameters
    ]
