"""Memory on the CPU that is not given back to the system between steps."""

from __future__ import annotations

import pytorch_lightning as pl

from ldm.host import give_back_free_pages, keep_freed_memory
from ldm.optim.boundary import at_step_boundary

LARGE_MODEL = 1e9  # bytes of weights beside whose step it takes little time to fill free pages anew


class KeepHostMemory(pl.Callback):
    """Keeps what a training step on the CPU has freed, so that its next allocations are fast.

    From the second step on: the optimizer's state, which the first one makes, would be between what
    is freed. The step of a large model starts without the last one's free pages: its backward pass
    leaves holes that the forward pass does not fill, and which would stay beside what the forward
    pass takes anew.
    """

    def __init__(self) -> None:
        self._keeps = False
        self._between = False  # between two steps

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object
    ) -> None:
        if (
            self._keeps
            and self._between
            and sum(p.nbytes for p in pl_module.parameters()) > LARGE_MODEL
        ):
            give_back_free_pages()  # and not at the batch's end, when the gradients are still there

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        self._between = at_step_boundary(trainer, batch_idx)
        if self._between and not self._keeps and pl_module.device.type == "cpu":
            self._keeps = True
            keep_freed_memory()
