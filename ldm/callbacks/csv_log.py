"""The logged numbers as CSV, of which a kill takes nothing that a checkpoint has behind it."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.loggers.logger import rank_zero_experiment
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from ldm.files import write_atomically
from ldm.optim.boundary import at_step_boundary


class CsvLog(CSVLogger):
    """Lightning's logger, whose rows `RowsFirst` writes, and whose file is never empty for a
    moment.
    """

    _ahead: tuple[int | None, dict[str, float]] | None = None

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        if self._experiment is None:
            self._experiment = _Writer(self.log_dir)
        assert isinstance(self._experiment, ExperimentWriter)
        return self._experiment

    @rank_zero_only
    def log_metrics(  # type: ignore[override]
        self, metrics: Mapping[str, float], step: int | None = None
    ) -> None:
        if (step, metrics) != self._ahead:
            super().log_metrics(dict(metrics), step)

    @rank_zero_only
    def log_ahead(self, metrics: Mapping[str, float], step: int) -> None:
        """Write a row now, and not again when Lightning logs it."""
        self.log_metrics(metrics, step)
        self.save()
        self._ahead = (step, dict(metrics))


class _Writer(ExperimentWriter):
    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        """Write the rows anew under more columns, in one go: a kill would leave Lightning's file
        empty.
        """
        with open(self.metrics_file_path, newline="") as file:
            rows = list(csv.DictReader(file))

        def write(path: Path) -> None:
            with open(path, "w", newline="") as file:
                writer = csv.DictWriter(file, fieldnames)
                writer.writeheader()
                writer.writerows(rows)

        write_atomically(self.metrics_file_path, write)


class RowsFirst(pl.Callback):
    """Write a step's row before its checkpoint, and before an error ends the run.

    Lightning logs behind the checkpoint: a kill in between would lose the row. This has to come
    before what writes checkpoints.
    """

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        if at_step_boundary(trainer, batch_idx):
            _write_row(trainer)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        loop = trainer.fit_loop.epoch_loop
        progress: Any = loop.batch_progress.current
        # Lightning counts a batch as completed when all callbacks are done with it.
        at_its_end = progress.processed == progress.completed + 1
        if trainer.state.fn == TrainerFn.FITTING and at_its_end and not loop._should_accumulate():
            _write_row(trainer)


def _write_row(trainer: pl.Trainer) -> None:
    connector = trainer._logger_connector
    loggers = [logger for logger in trainer.loggers if isinstance(logger, CsvLog)]
    if not loggers or not connector.should_update_logs:
        return
    if values := connector.metrics["log"]:
        row = {name: float(value) for name, value in values.items()}
        row["epoch"] = trainer.current_epoch
        for logger in loggers:
            logger.log_ahead(row, trainer.fit_loop.epoch_loop._batches_that_stepped)
