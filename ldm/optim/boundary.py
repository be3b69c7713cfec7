"""Where an optimizer step ends, when a step is made of several batches."""

from __future__ import annotations

from typing import Any


def at_step_boundary(trainer: Any, batch_idx: int) -> bool:
    """Return whether no accumulated gradient is pending, which a checkpoint would lose."""
    done = batch_idx + 1
    return done % trainer.accumulate_grad_batches == 0 or done == trainer.num_training_batches
