"""Whether the checkpoints of a training fit on its disk, before it starts."""

from __future__ import annotations

import logging
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.callbacks.checkpoints import CheckpointKeeper
from ldm.checkpoints.export import DTYPES
from ldm.errors import UserError
from ldm.files import size_text
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.optim.in_backward import SUFFIX
from ldm.training.memory import STATE_BYTES

if TYPE_CHECKING:
    import pytorch_lightning as pl

log = logging.getLogger(__name__)

ADAM_BYTES = 8  # of each trained parameter: two moments in float32


@dataclass(frozen=True)
class Need:
    """Bytes on the disk that a training will write.

    Args:
        checkpoint: one checkpoint.
        most: all that lies there at once: the checkpoints that are kept, and the export.
        checkpoints: how many of them are kept.
    """

    checkpoint: int
    most: int
    checkpoints: int


def check_disk(
    trainer: pl.Trainer,
    model: pl.LightningModule,
    keeper: CheckpointKeeper | None,
    export: str | None = None,
    step: int = 0,
) -> None:
    """Compare what a training will write with the room on its disk.

    Args:
        export: the precision of the file that the run exports at its end.
        step: the one that the run goes on from.

    Raises:
        UserError: not even one checkpoint fits. That some do and not all of them is a warning, for
            they may be moved away during the run.
    """
    if keeper is None:
        return
    place = Path(keeper.dirpath or trainer.default_root_dir).absolute()
    while not place.exists():
        place = place.parent
    need = needed(trainer, model, keeper, export, step)
    free = shutil.disk_usage(place).free
    there = f"the disk has {size_text(free)} free"
    if need.checkpoint > free:
        raise UserError(
            f"{place}: a checkpoint of this run takes about {size_text(need.checkpoint)} and "
            f"{there}: make room, or write elsewhere"
        )
    if need.most > free:
        log.warning(
            "%s: the %d checkpoints of this run take about %s and %s: make room, or keep fewer "
            "(lightning.modelcheckpoint.params.every_n_train_steps or save_top_k)",
            *(place, need.checkpoints, size_text(need.most), there),
        )


def needed(
    trainer: pl.Trainer,
    model: pl.LightningModule,
    keeper: CheckpointKeeper,
    export: str | None = None,
    step: int = 0,
) -> Need:
    """Estimate what a training from `step` on will write.

    Of a LoRA run, whose adapters do not exist yet, only the weights that they change are counted.
    """
    # One checkpoint: the weights, with EMA weights where there are any, and the optimizer's state.
    weights = list(model.state_dict().values())
    checkpoint = sum(value.nbytes for value in weights)
    if not keeper.save_weights_only and not getattr(model, "lora", None):
        name = str(getattr(model, "optimizer", "adam")).removesuffix(SUFFIX)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        checkpoint += STATE_BYTES.get(name, ADAM_BYTES) * trained

        # A teacher that is a copy of the weights is kept with them.
        if isinstance(model, LatentDiffusion):
            checkpoint += model.preservation.copied_bytes(model)

    # How many lie there at once. A new one is written before an old one goes.
    steps, every = trainer.max_steps - step, keeper._every_n_train_steps
    written = math.ceil(steps / every) if steps > 0 and every > 0 else 1
    kept = written if keeper.save_top_k < 0 else min(written, keeper.save_top_k + 1)
    most = kept * checkpoint
    if export:
        most += DTYPES[export].itemsize * sum(value.numel() for value in weights)
    return Need(checkpoint, most, kept)
