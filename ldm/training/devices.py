"""What `--gpus` means on this machine."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import torch

from ldm.errors import UserError

log = logging.getLogger(__name__)

CPU_INFO = Path("/proc/cpuinfo")
BF16_FLAGS = {"avx512_bf16", "amx_bf16"}


def accelerators() -> tuple[str, int]:
    """The accelerator that this machine has, in Lightning's word for it, and how many."""
    if torch.cuda.is_available():
        return "gpu", torch.cuda.device_count()
    if torch.backends.mps.is_available():
        return "mps", 1
    return "cpu", 0


def default_precision(accelerator: str) -> str:
    """bfloat16 autocast where the device computes in it, else float32; weights and optimizer stay in float32.

    Args:
        accelerator: Lightning's word for it.
    """
    kind = accelerators()[0] if accelerator == "auto" else accelerator
    if kind in ("gpu", "cuda") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    return "bf16-mixed" if kind == "cpu" and BF16_FLAGS & _cpu_flags() else "32-true"


def _cpu_flags() -> set[str]:
    """What the processor says that it can, where the system says it."""
    try:
        lines = CPU_INFO.read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), set())


def parse_gpus(text: str) -> dict[str, Any]:
    """Trainer arguments for a `--gpus` value: `0,` and `0,1` list indices, a bare `1` or `2` is a count.

    `0` is the CPU, as it was in Lightning 1. On a machine without a GPU a request for just the first one
    runs on the CPU, with a warning.

    Raises:
        UserError: a value that is no such list, or names a GPU that is not there.
    """
    if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*,?\s*", text):
        raise UserError(f"--gpus {text}: expected a list such as '0,' or '0,1', or a count")
    numbers = [int(number) for number in text.split(",") if number.strip()]
    wanted = numbers if "," in text else list(range(numbers[0]))
    kind, available = accelerators()
    if not wanted:
        log.info("--gpus %s: no GPU: training on the CPU (write '0,' for the first GPU)", text)
        return {"accelerator": "cpu", "devices": 1}
    if not available and wanted == [0]:
        log.warning("--gpus %s: this machine has no GPU: training on the CPU", text)
        return {"accelerator": "cpu", "devices": 1}
    if missing := [index for index in wanted if index >= available]:
        there = f"GPUs 0 to {available - 1}" if available else "no GPU"
        raise UserError(f"--gpus {text}: there is no GPU {missing[0]}: this machine has {there}")
    if len(set(wanted)) != len(wanted):
        raise UserError(f"--gpus {text}: a GPU is named twice")
    log.info("--gpus %s: training on %s %s", text, kind, ", ".join(map(str, wanted)))
    return {"accelerator": kind, "devices": wanted if kind == "gpu" else 1}
