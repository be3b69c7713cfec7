"""Where an optimizer step ends, when a step is made of several batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytorch_lightning as pl


def at_step_boundary(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Return whether no accumulated gradient is pending, which a checkpoint would lose."""
    done = batch_idx + 1
    return done % trainer.accumulate_grad_batches == 0 or done == trainer.num_training_batches
