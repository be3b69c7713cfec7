"""Seconds, memory and floating-point operations of training steps."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from torch.utils.flop_counter import FlopCounterMode

from ldm.benchmark.machine import CLOCKS, counting_flops, synchronize
from ldm.callbacks.timing import peak_memory_bytes
from ldm.host import CUDA


class StepClock:
    """Times optimizer steps: `warmup` that do not count, `steps` that do, and one more whose
    operations are counted.

    Counting takes time, and the peak of memory is read before it. Operations are those that PyTorch
    dispatches: matrix products, convolutions and attention, those that checkpointing repeats
    included.

    Args:
        clock: of `CLOCKS`.

    Attributes:
        seconds: of each of the `steps`, from the end of the step before to its own: the data's way
            is in it.
        peak_bytes: the GPU's, from `begin` on; on the CPU the process's.
        flops: of a step; None if nothing was counted.
    """

    def __init__(self, warmup: int, steps: int, clock: str = "wall"):
        self.warmup, self.steps, self.clock = warmup, steps, clock
        self.seconds: list[float] = []
        self.peak_bytes = 0
        self.flops: int | None = None
        self._done = 0
        self._counter: FlopCounterMode | None = None

    @property
    def total(self) -> int:
        """Steps to take."""
        return self.warmup + self.steps + 1

    def begin(self, device: torch.device) -> None:
        """Start the clock. The model is ready and the first step follows."""
        self._device = device
        if device.type == CUDA:
            torch.cuda.reset_peak_memory_stats(device)
        self._now()

    def before(self) -> None:
        """Note that a step follows, or a further batch of a step that accumulates."""
        if self._done == self.total - 1 and self._counter is None:
            self._counter = counting_flops()
            self._counter.__enter__()

    def after(self) -> None:
        """Note that a step is done."""
        self._done += 1
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self.flops, self._counter = self._counter.get_total_flops() or None, None
            return
        previous, now = self._since, self._now()
        if self._done > self.warmup:
            self.seconds.append(now - previous)
        if self._done == self.total - 1:
            self.peak_bytes = peak_memory_bytes(self._device)

    def _now(self) -> float:
        synchronize(self._device)
        self._since = CLOCKS[self.clock]()
        return self._since


class ClockCallback(pl.Callback):
    """A `StepClock` for a Lightning training."""

    def __init__(self, warmup: int, steps: int, clock: str = "wall"):
        self.clock = StepClock(warmup, steps, clock)
        self._step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step
        self.clock.begin(pl_module.device)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        self.clock.before()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        if trainer.global_step != self._step:  # else between accumulated batches
            self._step = trainer.global_step
            self.clock.after()
