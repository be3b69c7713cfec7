"""Grids of what the model sees and makes, on disk and in TensorBoard."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytorch_lightning as pl
from jaxtyping import Float
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn

from ldm.callbacks.panel import NAME, can_draw, make_panel
from ldm.distributed import computes
from ldm.errors import ParameterError, UserError
from ldm.modules.losses.batch import RawBatch
from ldm.util import check_params

if TYPE_CHECKING:
    pass

WHERE = "lightning.callbacks.image_logger.params"


class ImageLogger(pl.Callback):
    """Every `batch_frequency` steps, the grids that the model's `log_images` returns, in
    `images/{split}/`.

    With them comes a panel in `images/panel/`, the first before anything is learned, the last at
    the end: rows of pictures of fixed prompts from fixed noise.

    Args:
        batch_frequency: optimizer steps between grids.
        max_images: images of the subject and of the prior each in a grid.
        clamp: cut values to [-1, 1].
        increase_log_steps: also at steps 1, 2, 4, 8, ... up to `batch_frequency`.
        rescale: the images are in [-1, 1] (else in [0, 1]).
        disabled: log nothing.
        log_first_step: also before anything is learned.
        log_images_kwargs: arguments of the model's `log_images`.
        panel: what the panel shows, see `Panel`; null or false for none. Without it, models that
            make pictures of text alone have one.
    """

    def __init__(
        self,
        batch_frequency: int = 500,
        max_images: int = 4,
        clamp: bool = True,
        increase_log_steps: bool = True,
        rescale: bool = True,
        disabled: bool = False,
        log_first_step: bool = False,
        log_images_kwargs: dict[str, object] | None = None,
        panel: Mapping[str, object] | bool | None = True,
    ):
        if max_images < 1:
            raise ParameterError("max_images", f"expected 1 or more, got {max_images}")
        self.batch_frequency = batch_frequency
        self.max_images = max_images
        self.clamp = clamp
        self.rescale = rescale
        self.disabled = disabled or batch_frequency < 1
        self.log_first_step = log_first_step
        self.log_images_kwargs = dict(log_images_kwargs or {})
        self._early = (
            {2**n for n in range(32) if 2**n < batch_frequency} if increase_log_steps else set()
        )
        self._last_step = -1
        self.drawn_at = -1  # the step of the newest pictures
        self._panel_at = -1
        self.panel = make_panel(panel, self.log_images_kwargs)
        self._default_panel = panel is True

    def check(self, model: Any, data: object) -> None:
        """Raise a `UserError` for arguments that `log_images` does not take, or a panel that the
        model cannot draw.
        """
        if not self.disabled:
            given = {"batch": None, "N": self.max_images, **self.log_images_kwargs}
            check_params(model.log_images, given, f"{WHERE}.log_images_kwargs")
        if self.panel and not can_draw(model) and not self._default_panel:
            raise UserError(
                f"{WHERE}.{NAME}: this model makes no pictures of text alone; remove it"
            )

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        self.check(pl_module, None)
        if not can_draw(pl_module):
            self.panel = None

    def due(self, step: int) -> bool:
        """Return whether this many optimizer steps deserve a grid."""
        return (
            not self.disabled
            and step > 0
            and (step % self.batch_frequency == 0 or step in self._early)
        )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: RawBatch, batch_idx: int
    ) -> None:
        if self._last_step >= 0:
            return
        self._last_step = trainer.global_step
        if self.panel:
            self.panel.size_as(pl_module, batch)
        if self._last_step > 0:  # a resumed run
            return
        if self.log_first_step:
            self.log_images(trainer, pl_module, batch, "train")
        self.log_panel(trainer, pl_module, batch)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: object,
        batch: RawBatch,
        batch_idx: int,
    ) -> None:
        step = trainer.global_step
        if step == self._last_step:
            return
        self._last_step = step
        if self.due(step):
            self.log_images(trainer, pl_module, batch, "train")
        if self._panel_due(step):
            self.log_panel(trainer, pl_module, batch)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the panel of the last step, which shows what the run has made."""
        if self._last_step >= 0 and self._panel_at != trainer.global_step:
            self.log_panel(trainer, pl_module, None)

    def _panel_due(self, step: int) -> bool:
        if not self.panel:
            return False
        every = self.panel.every_n_steps
        return self.due(step) if every is None else step % every == 0

    def log_images(self, trainer: pl.Trainer, pl_module: Any, batch: RawBatch, split: str) -> None:
        """Make the grids of a batch and save them, on the first rank."""
        if self.disabled or not computes(trainer):
            return
        with _evaluating(pl_module):
            pictures = pl_module.log_images(
                batch, **{"N": self.max_images, **self.log_images_kwargs}
            )
        self.drawn_at = trainer.global_step
        for name, images in pictures.items():
            self._save(trainer, self._to_grid(images), split, name)

    def log_panel(self, trainer: pl.Trainer, pl_module: Any, batch: RawBatch | None) -> None:
        """Draw the panel and save it, on the first rank."""
        if self.disabled or self.panel is None or not computes(trainer):
            return
        self._panel_at = trainer.global_step
        with _evaluating(pl_module):
            sheet = self.panel.draw(trainer, pl_module, batch)
        if sheet is not None:
            self.drawn_at = trainer.global_step
            _write(trainer, sheet, "panel", f"panel_gs-{trainer.global_step:06}")

    def _to_grid(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "c _ _"]:
        from torchvision.utils import make_grid

        images = images.detach().float().cpu()
        images = images.clamp(-1, 1) if self.clamp else images
        grid = make_grid(images, nrow=self.max_images)
        return (grid + 1) / 2 if self.rescale else grid

    def _save(
        self, trainer: pl.Trainer, grid: Float[Tensor, "c h w"], split: str, name: str
    ) -> None:
        from torchvision.transforms.functional import to_pil_image

        name = f"{name}_gs-{trainer.global_step:06}_e-{trainer.current_epoch:06}"
        _write(trainer, to_pil_image(grid.clamp(0, 1)), split, name)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


def _write(trainer: pl.Trainer, image: Image.Image, group: str, name: str) -> None:
    """Save a picture as `images/{group}/{name}.png`, and in TensorBoard under the name's first
    word; the first rank does.
    """
    if not trainer.is_global_zero:
        return
    folder = Path(trainer.default_root_dir) / "images" / group
    folder.mkdir(parents=True, exist_ok=True)
    image.save(folder / f"{name}.png")
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            title = f"{group}/{name.partition('_gs-')[0]}"
            logger.experiment.add_image(
                title, np.asarray(image), trainer.global_step, dataformats="HWC"
            )
