"""Memory on the CPU that is not given back to the system between steps."""

from __future__ import annotations

import ctypes
import platform
from typing import Any

import pytorch_lightning as pl

# Parameters of mallopt(3), and the value that switches trimming off.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, NEVER = -1, -3, -1
LARGEST = 2**30  # bytes that are taken from the heap, not mapped


def keep_freed_memory() -> bool:
    """Have glibc keep freed memory for the next allocation, for the rest of this process; False where it is not glibc.

    By default it maps each large block anew, and the system fills it with zeros page by page: of a full-size training
    step that is about a third of the time.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)
    return bool(libc.mallopt(M_MMAP_THRESHOLD, LARGEST) and libc.mallopt(M_TRIM_THRESHOLD, NEVER))


class KeepHostMemory(pl.Callback):
    """Keeps what a training step on the CPU has freed for the next one: faster, and at its peak all along.

    From the second step on: the optimizer's state, which the first one makes, would be between what is freed.
    """

    def __init__(self) -> None:
        self._first = True

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self._first and pl_module.device.type == "cpu":
            keep_freed_memory()
        self._first = False
