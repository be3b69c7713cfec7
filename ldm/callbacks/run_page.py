"""The run's page and the list of runs, written as the run goes on; and its settings for loggers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.loggers import TensorBoardLogger

from ldm.callbacks.csv_log import CsvLog
from ldm.callbacks.image_logger import ImageLogger
from ldm.callbacks.setup import callbacks_of
from ldm.reports.index import write_index
from ldm.reports.runs import RUNNING, flat, write_run_page

log = logging.getLogger(__name__)

# What TensorBoard's table of runs compares, of those that a run logs.
COMPARED = ("val/loss_subject_fixed", "val/loss_prior_fixed", "train/loss_total")


class RunPage(pl.Callback):
    """Writes `report.html` into the run's folder and `index.html` beside it.

    It does so at every image log and at the end, whatever ends the run. The page reloads itself
    while the run goes on. A page that cannot be written is warned of and does not end the run.
    """

    def __init__(self) -> None:
        self._written = -1
        self._warned = False

    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        self._follow(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        self._follow(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(trainer, "finished")

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        if trainer.global_step > 0:
            self._write(trainer, f"ended early ({type(exception).__name__})")

    def _follow(self, trainer: pl.Trainer) -> None:
        """Write the page if pictures have been logged since it was written."""
        callbacks = callbacks_of(trainer)
        loggers = [c for c in callbacks if isinstance(c, ImageLogger)]
        drawn = max((logger.drawn_at for logger in loggers), default=-1)
        if drawn > self._written:
            self._written = drawn
            self._write(trainer, RUNNING)

    def _write(self, trainer: pl.Trainer, status: str) -> None:
        if not trainer.is_global_zero or not trainer.loggers:
            return
        folder = Path(trainer.default_root_dir)
        try:
            for logger in trainer.loggers:
                if isinstance(logger, CsvLog):
                    logger.save()
            write_run_page(folder, status, trainer.global_step, trainer.max_steps)
            if trainer.global_step > 0:  # a run that makes no step is removed again
                write_index(folder.parent)
        except Exception as error:  # the training is worth more than its page
            if not self._warned:
                log.warning("the run's page is not written: %s", error)
            self._warned = True


class LogSettings(pl.Callback):
    """Gives the run's settings to its loggers, so that they compare runs.

    TensorBoard's table also shows the last of the losses in `COMPARED`.
    """

    def __init__(self, config: Mapping[str, object]):
        self.use(config)

    def use(self, config: Mapping[str, object]) -> None:
        """Log the settings of this config."""
        self.settings = {key: _plain(value) for key, value in flat(config).items()}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                _to_tensorboard(logger, self.settings)
            else:
                logger.log_hyperparams(dict(self.settings))


def _to_tensorboard(logger: TensorBoardLogger, settings: Mapping[str, object]) -> None:
    """Write the settings, and name the metrics that stand beside them.

    Lightning's own way would log a first value of each metric, which the run has not measured.
    """
    from torch.utils.tensorboard.summary import hparams

    logger.hparams.update(settings)
    writer = logger.experiment._get_file_writer()
    assert writer is not None
    for summary in hparams(dict(settings), dict.fromkeys(COMPARED, 0.0)):
        writer.add_summary(summary)


def _plain(value: object) -> bool | int | float | str:
    """Return a value as loggers take it."""
    return value if isinstance(value, (bool, int, float, str)) else str(value)
