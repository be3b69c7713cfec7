"""The optimizers by the names that a config gives them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ldm.errors import ParameterError, nearest
from ldm.host import CUDA
from ldm.optim.in_backward import SUFFIX, AdamWInBackward, InBackward
from ldm.optim.muon import Muon, muon_groups

Part = (
    nn.Module | Mapping[str, Any]
)  # a network, or a parameter group with its networks as `modules`


def _muon_groups(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """Return the `muon_groups` of networks together, or of each named part."""
    groups = []
    for part in _named(parts):
        for group in muon_groups(nn.ModuleList(part["modules"])):
            kind = (
                {"name": f"{part['name']}-{'muon' if group['muon'] else 'adam'}"}
                if "name" in part
                else {}
            )
            groups.append({**_settings(part), **group, **kind})
    return groups


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adam": lambda modules, lr, **adam: _fused(torch.optim.Adam, modules, lr=lr, **adam),
    "adamw": lambda modules, lr, **adam: _fused(torch.optim.AdamW, modules, lr=lr, **adam),
    "adamw_in_backward": lambda modules, lr, **adam: _fused(
        AdamWInBackward, modules, lr=lr, **adam
    ),
    "adamw8bit": lambda modules, lr, **adam: _eight_bit(modules, False, lr=lr, **adam),
    "adamw8bit_in_backward": lambda modules, lr, **adam: _eight_bit(modules, True, lr=lr, **adam),
    "muon": lambda modules, lr, **adam: Muon(_muon_groups(modules), lr=lr, **adam),
}


def check_name(name: str) -> None:
    """Raise a `UserError` for an optimizer that is not in `OPTIMIZERS`."""
    if name not in OPTIMIZERS:
        hint = nearest(name, list(OPTIMIZERS))
        raise ParameterError(
            "optimizer", f"unknown '{name}'{hint}; accepted: {', '.join(OPTIMIZERS)}"
        )


def shares_state(first: str, second: str) -> bool:
    """Return whether one optimizer can go on from the other's state."""
    kinds = {"adam": "adamw"}  # the same moments; the decay of weights has no state
    one, other = (
        kinds.get(name.removesuffix(SUFFIX), name.removesuffix(SUFFIX)) for name in (first, second)
    )
    return one == other


def make_optimizer(name: str, modules: Sequence[Part], lr: float, **adam: object) -> Optimizer:
    """Make an optimizer over the trained parameters of some networks.

    Args:
        modules: the networks, which make one parameter group; or for each group a mapping with its
            `modules`, its `name` and the settings that are its own, such as `lr`.
        adam: arguments of Adam's kind, such as `betas`.

    Raises:
        UserError: a name that is not in `OPTIMIZERS`.
    """
    check_name(name)
    return OPTIMIZERS[name](modules, lr, **adam)


FUSED = ("cpu", CUDA, "mps", "xpu")  # devices that torch has fused kernels for


def _fused(kind: type[Optimizer], modules: Sequence[Part], **options: Any) -> Optimizer:
    """Make one of torch's optimizers, as one kernel over all parameters where there is one."""
    groups = _trained(modules)
    parameters = [
        p for group in groups for p in (group["params"] if isinstance(group, dict) else [group])
    ]
    fused = all(p.device.type in FUSED and p.is_floating_point() for p in parameters) or None
    optimizer = kind(groups, **{"fused": fused, **options})
    optimizer.register_load_state_dict_post_hook(_lay_out)
    return optimizer


def _lay_out(optimizer: Optimizer) -> None:
    """Give a loaded state the layout of its parameters.

    torch's fused kernels read both in the order of memory. The state of a run whose convolutions
    had their channels elsewhere would silently meet other weights than its own.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            of_weights = isinstance(value, Tensor) and value.shape == parameter.shape
            if of_weights and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _eight_bit(modules: Sequence[Part], in_backward: bool, **options: object) -> Optimizer:
    """Make AdamW with moments of 8 bits in blocks (Dettmers et al., 2110.02861).

    Its state takes 2 bytes a parameter instead of 8.
    """
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ParameterError(
            "optimizer", "adamw8bit needs: pip install -e '.[low-memory]'"
        ) from error
    kind = type("AdamW8bitInBackward", (InBackward, AdamW8bit), {}) if in_backward else AdamW8bit
    return kind(_trained(modules), **{"weight_decay": 0.01, **options})


def _trained(modules: Sequence[Part]) -> list[nn.Parameter] | list[dict[str, Any]]:
    """Return the trained parameters of networks, or the parameter groups of named parts."""
    if any(isinstance(part, Mapping) for part in modules):
        return [
            {**_settings(part), "params": _trained(part["modules"])} for part in _named(modules)
        ]
    networks = [part for part in modules if isinstance(part, nn.Module)]
    return [
        parameter
        for module in networks
        for parameter in module.parameters()
        if parameter.requires_grad
    ]


def _named(parts: Sequence[Part]) -> list[Mapping[str, Any]]:
    """Return parts as mappings, networks together as one without a name."""
    mappings = [part for part in parts if isinstance(part, Mapping)]
    assert not mappings or len(mappings) == len(parts), "networks and named parts do not mix"
    return mappings or [{"modules": parts}]


def _settings(part: Mapping[str, object]) -> dict[str, Any]:
    return {key: value for key, value in part.items() if key != "modules"}
