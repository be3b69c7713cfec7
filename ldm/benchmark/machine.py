"""What the figures hold for: the machine, the packages, and the rate of a large matrix product."""

from __future__ import annotations

import importlib.util
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ldm.checkpoints.export import DTYPES
from ldm.errors import UserError
from ldm.host import CUDA, cpu_model

# The wall, or what this process computed: of use where other programs compete for the processor.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}

PACKAGES = ("torch", "pytorch-lightning", "transformers", "diffusers")
MATMUL_SIDES = {CUDA: 8192, "cpu": 1024}
ENOUGH = 1.0  # second of a product: many processors compute half precision slowly


def machine(device: str = "cpu") -> dict[str, Any]:
    """Describe the processor, its threads, the GPU that is measured, and the packages' versions."""
    found: dict[str, Any] = {
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if device == CUDA:
        found["gpu"] = torch.cuda.get_device_name()
    return found | {
        name: version(name) for name in PACKAGES if importlib.util.find_spec(name.replace("-", "_"))
    }


def synchronize(device: torch.device) -> None:
    """Wait for what the device still computes."""
    if device.type == CUDA:
        torch.cuda.synchronize(device)


def counting_flops() -> FlopCounterMode:
    """Return what counts the floating-point operations inside of it."""
    own: dict[Any, Callable[..., int]] = {}
    if torch.backends.mkldnn.is_available():  # of `ldm.modules.layers`
        own[torch.ops.mkldnn._linear_pointwise] = _product_flops
    return FlopCounterMode(display=False, custom_mapping=own)


def _product_flops(x: Sequence[int], weight: Sequence[int], *_: object, **__: object) -> int:
    """Count the operations of x W^T, from the shapes."""
    return 2 * math.prod(x) * weight[0]


def matmul_rate(
    device_name: str,
    dtype: str,
    threads: int,
    clock: str = "wall",
    times: int = 5,
    side: int | None = None,
) -> float:
    """Return the most floating-point operations per second, by `clock`, that the product of two
    large square matrices reaches.
    """
    torch.set_num_threads(threads)
    device, side = torch.device(device_name), side or MATMUL_SIDES[device_name]
    a, b = (torch.randn(side, side, device=device).to(DTYPES[dtype]) for _ in range(2))
    best = float("inf")
    for _ in range(times + 1):  # the first one warms up
        synchronize(device)
        start = CLOCKS[clock]()
        a @ b
        synchronize(device)
        best = min(best, CLOCKS[clock]() - start)
        if best > ENOUGH:
            break
    return 2 * side**3 / best


def require_diffusers() -> None:
    """Raise a `UserError` if diffusers is not installed."""
    if importlib.util.find_spec("diffusers") is None:
        raise UserError(
            "--against diffusers: the package is not installed: pip install 'diffusers>=0.30'"
        )
