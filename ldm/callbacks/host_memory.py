"""Memory on the CPU that is not given back to the system between steps."""

from __future__ import annotations

import ctypes
import functools
import platform
from typing import Any

import pytorch_lightning as pl

from ldm.callbacks.checkpoints import at_step_boundary

# Parameters of mallopt(3), and the value that switches trimming off.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, NEVER = -1, -3, -1
LARGEST = 2**30  # bytes that are taken from the heap, not mapped
LARGE_MODEL = 1e9  # bytes of weights beside whose step it takes little time to fill free pages anew


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def keep_freed_memory() -> bool:
    """Have glibc keep freed memory for the next allocation, for the rest of this process; False where it is not glibc.

    By default it maps each large block anew, and the system fills it with zeros page by page: of a full-size training
    step that is about a third of the time.
    """
    libc = _glibc()
    if libc is None:
        return False
    libc.malloc_trim(0)
    return bool(libc.mallopt(M_MMAP_THRESHOLD, LARGEST) and libc.mallopt(M_TRIM_THRESHOLD, NEVER))


def give_back_free_pages() -> bool:
    """Give the system the pages of the heap in which nothing lies now, kept or not; False where it is not glibc."""
    libc = _glibc()
    return libc is not None and bool(libc.malloc_trim(0))


class KeepHostMemory(pl.Callback):
    """Keeps what a training step on the CPU has freed, so that its next allocations are fast.

    From the second step on: the optimizer's state, which the first one makes, would be between what is freed. The step
    of a large model starts without the last one's free pages: its backward pass leaves holes that the forward pass
    does not fill, and which would stay beside what the forward pass takes anew.
    """

    def __init__(self) -> None:
        self._keeps = False
        self._between = False  # between two steps

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self._keeps and self._between and sum(p.nbytes for p in pl_module.parameters()) > LARGE_MODEL:
            give_back_free_pages()  # and not at the batch's end, when the gradients are still there

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._between = at_step_boundary(trainer, batch_idx)
        if self._between and not self._keeps and pl_module.device.type == "cpu":
            self._keeps = True
            keep_freed_memory()
