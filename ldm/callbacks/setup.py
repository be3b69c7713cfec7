"""The run folder on disk, and the configuration inside every checkpoint."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Protocol, runtime_checkable

import pytorch_lightning as pl

from ldm.config import save_yaml
from ldm.files import write_atomically
from ldm.host import environment


class RunFolder(Protocol):
    """Where a run's files go, the name of this start of it, and whether that has made a step."""

    trained: bool

    @property
    def stamp(self) -> str: ...
    @property
    def configs(self) -> Path: ...
    @property
    def checkpoints(self) -> Path: ...
    @property
    def images(self) -> Path: ...


@runtime_checkable
class ChecksRun(Protocol):
    """A callback that knows before the training what it cannot work with."""

    def check(self, model: pl.LightningModule, data: pl.LightningDataModule | None) -> None:
        """Raise a `UserError` for a model or data that it cannot work with."""


def callbacks_of(trainer: pl.Trainer) -> list[pl.Callback]:
    """Return a trainer's callbacks, in the order in which they are called."""
    return trainer.callbacks  # type: ignore[attr-defined]


class SetupCallback(pl.Callback):
    """Makes the run folder and saves the configs that ran, when training really starts.

    A checkpoint carries the whole config too, so that it can be sampled from wherever it is moved.
    """

    def __init__(self, run: RunFolder, config: dict[str, object]):
        self.run = run
        self.config = config
        self._first_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._first_step = trainer.global_step

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not trainer.is_global_zero or stage != "fit":
            return
        for folder in (self.run.configs, self.run.checkpoints, self.run.images):
            folder.mkdir(parents=True, exist_ok=True)
        lightning = {"lightning": self.config.get("lightning", {})}
        project = {key: value for key, value in self.config.items() if key != "lightning"}
        for name, config in {"project": project, "lightning": lightning}.items():
            # A resumed run reads all of these: half a file would be an error, or half a number.
            write_atomically(
                self.run.configs / f"{self.run.stamp}-{name}.yaml",
                functools.partial(save_yaml, config),
            )

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        self.run.trained = self.run.trained or trainer.global_step > self._first_step

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, object]
    ) -> None:
        checkpoint["config"] = self.config
        checkpoint["environment"] = environment()
