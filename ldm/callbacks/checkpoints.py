"""Checkpoints that are never lost: written whole or not at all, and kept."""

from __future__ import annotations

import datetime
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO

from ldm.checkpoints.reading import read_checkpoint
from ldm.files import save_checkpoint, write_atomically

log = logging.getLogger(__name__)

LAST = "last.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files through `ldm.checkpoints.loading`: safe to read, never
    half-written.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        save_checkpoint(checkpoint, path)

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(path)


class CheckpointKeeper(ModelCheckpoint):
    """Lightning's `ModelCheckpoint`, with `last.ckpt` always the newest one and at no cost in
    space.

    It is a second name (a hard link) of the newest checkpoint, and is also written when the run
    ends or is interrupted. Remembers each checkpoint's value of the metric `score`, for the
    summary.
    """

    def __init__(self, score: str | None = None, save_last: bool = True, **kwargs: Any):
        super().__init__(save_last=False, **kwargs)
        self.score = score
        self.keep_last = save_last
        self.scores: dict[str, float] = {}
        self.last_step: int | None = None  # of `last.ckpt`, if this start of the run has written it
        self._newest: tuple[int, str] = (-1, "")
        self._validated = -2  # the step of the latest validation

    @property
    def last_path(self) -> Path:
        """Return where the newest checkpoint is."""
        return Path(self.dirpath or ".") / LAST

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        # Going on from an earlier checkpoint will replace `last.ckpt`, which may be the only one of
        # its step.
        start, last = trainer.ckpt_path, self.last_path
        if not (start and trainer.is_global_zero and last.exists()) or last.samefile(start):
            return
        if last.stat().st_nlink == 1:
            stamp = datetime.datetime.fromtimestamp(last.stat().st_mtime).strftime(
                "%Y-%m-%dT%H-%M-%S"
            )
            kept = last.with_name(f"last-of-{stamp}.ckpt")
            os.link(last, kept)
            log.info("%s is kept as %s", last, kept.name)

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Restore which checkpoints there are, also in a run folder that was moved."""
        here, there = str(self.dirpath), str(state_dict.get("dirpath"))

        def moved(value: object) -> Any:
            if isinstance(value, dict):
                return {moved(key): moved(inner) for key, inner in value.items()}
            return (
                value.replace(there, here, 1)
                if isinstance(value, str) and value.startswith(there)
                else value
            )

        super().load_state_dict(moved(state_dict))

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        self._newest = (trainer.global_step, filepath)
        self._score_newest(trainer)
        if self.keep_last and trainer.is_global_zero:
            _link(Path(filepath), self.last_path)
        self.last_step = trainer.global_step

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if not trainer.sanity_checking:
            self._validated = trainer.global_step
            self._score_newest(trainer)

    def _score_newest(self, trainer: pl.Trainer) -> None:
        """Record the newest checkpoint's score, if the validation was of its very step."""
        step, filepath = self._newest
        value = trainer.callback_metrics.get(self.score or "")
        if value is not None and step == self._validated:
            self.scores[filepath] = float(value)

    def save_last_now(self, trainer: pl.Trainer) -> None:
        """Write `last.ckpt`, unless the newest checkpoint already is of this step; on all ranks."""
        if self.keep_last and self.last_step != trainer.global_step:
            trainer.save_checkpoint(self.last_path, self.save_weights_only)
            self.last_step = self._last_global_step_saved = trainer.global_step

    def save_at(self, trainer: pl.Trainer, positions: dict[str, Any]) -> None:
        """Write `last.ckpt` from the weights as they are, with a training's `positions` from
        before.

        Call it on the first process alone: it asks nothing of the others.
        """
        if self.keep_last:
            content = trainer._checkpoint_connector.dump_checkpoint(bool(self.save_weights_only))
            trainer.strategy.save_checkpoint({**content, **positions}, self.last_path)
            self.last_step = self._last_global_step_saved = positions["global_step"]

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Leave it to `KeepWholeSteps`, which knows whether the weights are of a whole step."""

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: object,
        batch_idx: int,
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        # Not only in on_train_end: by then Lightning has closed the epoch that it stopped in, and a
        # run that goes on from there would begin a new one.
        if 0 < trainer.max_steps <= trainer.global_step:
            self.save_last_now(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self.save_last_now(trainer)

    @property
    def best(self) -> tuple[str, float] | None:
        """Return the checkpoint with the lowest `score`, and that score, where one was measured."""
        return min(self.scores.items(), key=lambda item: item[1]) if self.scores else None


def _link(source: Path, target: Path) -> None:
    """Make `target` another name of `source`, or a copy where the file system has no links;
    atomically.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
        os.replace(temporary, target)
    except OSError:
        write_atomically(target, lambda path: shutil.copyfile(source, path), source.stat().st_size)


def keeper_of(trainer: pl.Trainer) -> CheckpointKeeper | None:
    """Return what keeps a run's checkpoints, or None where the config switched it off."""
    keepers = [c for c in trainer.checkpoint_callbacks if isinstance(c, CheckpointKeeper)]
    return keepers[0] if keepers else None
