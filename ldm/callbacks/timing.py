"""Seconds a step takes and the most memory it needed."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytorch_lightning as pl
import torch

from ldm.files import write_atomically
from ldm.host import CUDA


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory in use so far: the GPU's for CUDA, else this process's resident
    memory.
    """
    if device.type == CUDA:
        return torch.cuda.max_memory_allocated(device)
    return resident_bytes()[1]


def resident_bytes() -> tuple[int, int]:
    """Return this process's resident memory now, where the system says it, and at its peak."""
    status = Path("/proc/self/status")
    if (
        status.exists()
    ):  # resource's peak would be that of the parent, if it had more when this process started
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        now, peak = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
        return now, peak
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    return peak, peak


class TimingCallback(pl.Callback):
    """Measures a run's optimizer steps: `seconds_per_step` (without the first, which warms up) and
    `peak_bytes`.

    Args:
        file: a JSON file that is to have both at the end, with the number of `steps` of the run.
    """

    def __init__(self, file: str | None = None) -> None:
        self.file = None if file is None else Path(file)
        self.steps = 0
        self.seconds = 0.0
        self.peak_bytes = 0
        self._step = 0
        self._since: float | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step, self._since = trainer.global_step, None
        if pl_module.device.type == CUDA:
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        if trainer.global_step == self._step:
            return  # between accumulated batches
        now = time.perf_counter()
        if self._since is not None:
            self.steps += trainer.global_step - self._step
            self.seconds += now - self._since
        self._step, self._since = trainer.global_step, now

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.peak_bytes = peak_memory_bytes(pl_module.device)
        if self.file is not None and trainer.is_global_zero:
            found = {
                "seconds_per_step": self.seconds_per_step,
                "steps": trainer.global_step,
                "peak_bytes": self.peak_bytes,
            }
            text = json.dumps(found)
            write_atomically(self.file, lambda path: path.write_text(text, encoding="utf-8"))

    @property
    def seconds_per_step(self) -> float | None:
        """Return the mean seconds of an optimizer step, pictures and checkpoints included; None
        before the second.
        """
        return self.seconds / self.steps if self.steps else None
