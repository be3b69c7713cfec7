"""Grids of what the model sees and makes, on disk and in TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from jaxtyping import Float
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor

from ldm.util import check_params


class ImageLogger(pl.Callback):
    """Every `batch_frequency` steps, the grids that the model's `log_images` returns, in `images/{split}/`.

    Args:
        batch_frequency: optimizer steps between grids.
        max_images: images of each half of the batch in a grid.
        clamp: cut values to [-1, 1].
        increase_log_steps: also at steps 1, 2, 4, 8, ... up to `batch_frequency`.
        rescale: the images are in [-1, 1] (else in [0, 1]).
        disabled: log nothing.
        log_on_batch_idx: accepted for older configs, without effect: steps are counted, not batches.
        log_first_step: also before anything is learned.
        log_images_kwargs: arguments of the model's `log_images`.
    """

    def __init__(
        self,
        batch_frequency: int = 500,
        max_images: int = 4,
        clamp: bool = True,
        increase_log_steps: bool = True,
        rescale: bool = True,
        disabled: bool = False,
        log_on_batch_idx: bool = False,
        log_first_step: bool = False,
        log_images_kwargs: dict[str, Any] | None = None,
    ):
        self.batch_frequency = batch_frequency
        self.max_images = max_images
        self.clamp = clamp
        self.rescale = rescale
        self.disabled = disabled or batch_frequency < 1
        self.log_first_step = log_first_step
        self.log_images_kwargs = dict(log_images_kwargs or {})
        self._early = {2**n for n in range(32) if 2**n < batch_frequency} if increase_log_steps else set()
        self._last_step = -1

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Raises a `UserError` for arguments that the model's `log_images` does not take."""
        if not self.disabled:
            given = {"batch": None, "N": self.max_images, **self.log_images_kwargs}
            check_params(pl_module.log_images, given, "lightning.callbacks.image_logger.params.log_images_kwargs")

    def due(self, step: int) -> bool:
        """Whether this many optimizer steps deserve a grid."""
        return step > 0 and (step % self.batch_frequency == 0 or step in self._early)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.log_first_step and trainer.global_step == 0 and self._last_step < 0:
            self.log_images(trainer, pl_module, batch, "train")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.due(trainer.global_step) and trainer.global_step != self._last_step:
            self.log_images(trainer, pl_module, batch, "train")

    def log_images(self, trainer: pl.Trainer, pl_module: Any, batch: Any, split: str) -> None:
        """Make the grids of a batch and save them, on the first rank."""
        self._last_step = trainer.global_step
        if self.disabled or not trainer.is_global_zero:
            return
        was_training = pl_module.training
        pl_module.eval()
        try:
            pictures = pl_module.log_images(batch, **{"N": self.max_images, **self.log_images_kwargs})
        finally:
            pl_module.train(was_training)
        for name, images in pictures.items():
            self._save(trainer, self._to_grid(images), split, name)

    def _to_grid(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "c _ _"]:
        from torchvision.utils import make_grid

        images = images.detach().float().cpu()
        images = images.clamp(-1, 1) if self.clamp else images
        grid = make_grid(images, nrow=self.max_images)
        return (grid + 1) / 2 if self.rescale else grid

    def _save(self, trainer: pl.Trainer, grid: Float[Tensor, "c h w"], split: str, name: str) -> None:
        from torchvision.transforms.functional import to_pil_image

        folder = Path(trainer.default_root_dir) / "images" / split
        folder.mkdir(parents=True, exist_ok=True)
        step = trainer.global_step
        to_pil_image(grid.clamp(0, 1)).save(folder / f"{name}_gs-{step:06}_e-{trainer.current_epoch:06}.png")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(f"{split}/{name}", grid, global_step=step)
