"""One progress bar for the whole run, in optimizer steps."""

from __future__ import annotations

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar
from tqdm import tqdm


class StepProgress(ProgressBar):
    """Steps done of `max_steps`, the time they take, and the model's `prog_bar` metrics."""

    def __init__(self) -> None:
        super().__init__()
        self._bar: tqdm | None = None
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        total = trainer.max_steps if trainer.max_steps > 0 else None
        self._bar = tqdm(
            total=total,
            initial=trainer.global_step,
            unit="step",
            desc="training",
            disable=not self._enabled,
        )

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        assert self._bar is not None
        new = trainer.global_step - self._bar.n
        if new > 0:
            names = {
                name.rpartition("/")[2]: value
                for name, value in trainer.progress_bar_metrics.items()
            }
            self._bar.set_postfix(
                {name: f"{value:.4g}" for name, value in names.items()}, refresh=False
            )
            self._bar.update(new)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
