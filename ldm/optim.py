"""Muon for the miniature's training from scratch: fewer steps than AdamW for the same loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from ldm.backward_optimizer import AdamWInBackward, InBackward
from ldm.errors import UserError, nearest

Part = nn.Module | Mapping[str, Any]  # a network, or a parameter group with its networks as `modules`

NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


@torch.no_grad()
def orthogonalized(update: Float[Tensor, "m n"], steps: int = 5) -> Float[Tensor, "m n"]:
    """About the nearest matrix with orthonormal rows or columns, by Newton-Schulz iteration (Jordan, 2024).

    A step multiplies x by a polynomial in x x^T. The product of these is found with the small square matrices
    alone, and multiplied by the long x once.
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

    torch.optim.Muon takes matrices only and neither convolutions nor the other parameters. Updates are scaled to
    AdamW's size, `0.2 sqrt(max(m, n))` (Liu et al., 2502.16982), so that one learning rate serves both.

    Args:
        params: parameter groups, each with `muon: bool`; see `muon_groups`.
        lr: the learning rate.
        momentum: Muon's, of Nesterov's kind.
        betas, eps: AdamW's.
        weight_decay: decoupled, for both.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        defaults = {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "muon": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
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
    def _muon(parameter: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(grad, 1 - group["momentum"])
        update = grad.lerp(state["momentum"], group["momentum"]).flatten(1)
        scale = 0.2 * max(update.shape) ** 0.5
        parameter.add_(orthogonalized(update).reshape(parameter.shape), alpha=-group["lr"] * scale)

    @staticmethod
    def _adam(parameter: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        if not state:
            state.update(step=torch.zeros(()), mean=torch.zeros_like(parameter), square=torch.zeros_like(parameter))
        state["step"] += 1
        beta1, beta2 = group["betas"]
        state["mean"].lerp_(grad, 1 - beta1)
        state["square"].lerp_(grad.square(), 1 - beta2)
        step = state["step"].item()
        deviation = (state["square"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
        parameter.addcdiv_(state["mean"], deviation, value=-group["lr"] / (1 - beta1**step))


def muon_groups(module: nn.Module) -> list[dict[str, Any]]:
    """A module's trained parameters: hidden matrices for Muon; embeddings, norms, biases and ends for AdamW.

    An end is a convolution from or to few channels (pixels, latents): its gradient has few directions.
    """
    embeddings = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    groups: tuple[list[Tensor], list[Tensor]] = ([], [])
    for parameter in module.parameters():
        if parameter.requires_grad:
            hidden = parameter.ndim >= 2 and min(parameter.shape[:2]) >= 16 and id(parameter) not in embeddings
            groups[hidden].append(parameter)
    return [{"params": parameters, "muon": bool(k)} for k, parameters in enumerate(groups) if parameters]


def _muon_groups(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """`muon_groups` of networks together, or of each named part."""
    groups = []
    for part in _named(parts):
        for group in muon_groups(nn.ModuleList(part["modules"])):
            kind = {"name": f"{part['name']}-{'muon' if group['muon'] else 'adam'}"} if "name" in part else {}
            groups.append({**_settings(part), **group, **kind})
    return groups


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adam": lambda modules, lr, **adam: _fused(torch.optim.Adam, modules, lr=lr, **adam),
    "adamw": lambda modules, lr, **adam: _fused(torch.optim.AdamW, modules, lr=lr, **adam),
    "adamw_in_backward": lambda modules, lr, **adam: _fused(AdamWInBackward, modules, lr=lr, **adam),
    "adamw8bit": lambda modules, lr, **adam: _eight_bit(modules, False, lr=lr, **adam),
    "adamw8bit_in_backward": lambda modules, lr, **adam: _eight_bit(modules, True, lr=lr, **adam),
    "muon": lambda modules, lr, **adam: Muon(_muon_groups(modules), lr=lr, **adam),
}


def check_name(name: str) -> None:
    """Raise a `UserError` for an optimizer that is not in `OPTIMIZERS`."""
    if name not in OPTIMIZERS:
        hint = nearest(name, list(OPTIMIZERS))
        raise UserError(f"model.params.optimizer: unknown '{name}'{hint}; accepted: {', '.join(OPTIMIZERS)}")


def make_optimizer(name: str, modules: Sequence[Part], lr: float, **adam: Any) -> Optimizer:
    """An optimizer over the trained parameters of some networks; `adam` are arguments of Adam's kind.

    Args:
        modules: the networks, which make one parameter group; or for each group a mapping with its `modules`, its
            `name` and whatever of the optimizer's settings is its own, such as `lr`.

    Raises:
        UserError: a name that is not in `OPTIMIZERS`.
    """
    check_name(name)
    return OPTIMIZERS[name](modules, lr, **adam)


FUSED = ("cpu", "cuda", "mps", "xpu")  # devices that torch has fused kernels for


def _fused(kind: type[Optimizer], modules: Sequence[Part], **options: Any) -> Optimizer:
    """One of torch's optimizers, as one kernel over all parameters where there is one."""
    groups = _trained(modules)
    parameters = [p for group in groups for p in (group["params"] if isinstance(group, dict) else [group])]
    fused = all(p.device.type in FUSED and p.is_floating_point() for p in parameters) or None
    return kind(groups, **{"fused": fused, **options})


def _eight_bit(modules: Sequence[Part], in_backward: bool, **options: Any) -> Optimizer:
    """AdamW with moments of 8 bits in blocks (Dettmers et al., 2110.02861): 2 bytes a parameter instead of 8."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError("model.params.optimizer: adamw8bit needs: pip install -e '.[low-memory]'") from error
    kind = type("AdamW8bitInBackward", (InBackward, AdamW8bit), {}) if in_backward else AdamW8bit
    return kind(_trained(modules), **{"weight_decay": 0.01, **options})


def _trained(modules: Sequence[Part]) -> list[Any]:
    """The trained parameters of networks, or the parameter groups of named parts."""
    if any(isinstance(part, Mapping) for part in modules):
        return [{**_settings(part), "params": _trained(part["modules"])} for part in _named(modules)]
    networks = [part for part in modules if isinstance(part, nn.Module)]
    return [parameter for module in networks for parameter in module.parameters() if parameter.requires_grad]


def _named(parts: Sequence[Part]) -> list[Mapping[str, Any]]:
    """Parts as mappings, networks together as one without a name."""
    mappings = [part for part in parts if isinstance(part, Mapping)]
    assert not mappings or len(mappings) == len(parts), "networks and named parts do not mix"
    return mappings or [{"modules": parts}]


def _settings(part: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in part.items() if key != "modules"}
