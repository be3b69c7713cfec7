"""The loss of a few training examples at fixed time steps with fixed noise: a curve without the
noise of sampling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from einops import rearrange
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data.datamodule import DataModuleFromConfig
from ldm.data.image_folder import ImageFolderDataset
from ldm.data.streams import Stream
from ldm.data.turns import Together
from ldm.distributed import computes
from ldm.errors import ParameterError, UserError
from ldm.models.diffusion.conditioning import Beside, with_beside
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.rng import SampleRandom, derive_seed

WHERE = "lightning.callbacks.fixed_loss"
PARTS = {"subject": "train", "prior": "reg"}  # the datamodule's names of the datasets


@dataclass(frozen=True)
class Fixed:
    """Hold what is evaluated of the subject or of the prior: latents, captions, and noise for each
    pair.
    """

    latents: Tensor  # (examples, z, h, w)
    captions: list[str]
    t: Tensor  # (examples * time steps,), the first example's first
    noise: Tensor  # (examples * time steps, z, h, w)
    beside: Beside | None  # what the UNet reads of each example beside latents and text


class FixedLoss(pl.Callback):
    """Logs `val/loss_subject_fixed` and, with a prior, `val/loss_prior_fixed`: a function of the
    weights alone.

    The step that is logged is the number of optimizer steps that made the weights; the first value
    is from before any. Training is not changed by it. The first process does it, where weights are
    sharded together with the others.

    Args:
        every_n_steps: optimizer steps between two values.
        examples: of the subject and of the prior each, spread over the images; not augmented, and
            with the mode of the posterior as their latent.
        time_steps: in the middle of as many equal parts of the schedule; every example is evaluated
            at each.
        batch_size: examples that are evaluated at once.
        seed: of the noise.

    Raises:
        UserError: a number below 1, or a model or data that it cannot evaluate.
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        examples: int = 4,
        time_steps: int = 8,
        batch_size: int = 4,
        seed: int = 0,
    ):
        numbers = {
            "every_n_steps": every_n_steps,
            "examples": examples,
            "time_steps": time_steps,
            "batch_size": batch_size,
        }
        for name, number in numbers.items():
            if number < 1:
                raise ParameterError(name, f"expected 1 or more, got {number}")
        self.every_n_steps, self.examples, self.time_steps = every_n_steps, examples, time_steps
        self.batch_size, self.seed = batch_size, seed
        self._fixed: dict[str, Fixed] | None = None
        self._last_step = -1
        self.values: dict[str, float] | None = None  # the newest losses, and the step of them
        self.values_at = -1

    def check(self, model: pl.LightningModule, data: pl.LightningDataModule | None) -> None:
        """Raise a `UserError` for a model or data that it cannot evaluate."""
        if not isinstance(model, LatentDiffusion) or not isinstance(data, DataModuleFromConfig):
            raise UserError(
                f"{WHERE}: evaluates latent diffusion models on DataModuleFromConfig's "
                "data; remove it"
            )

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        self.check(pl_module, _data(trainer))
        self._fixed, self._last_step = None, -1

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        if self._last_step < 0:
            self._log(trainer, pl_module)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        if trainer.global_step % self.every_n_steps == 0 and trainer.global_step != self._last_step:
            self._log(trainer, pl_module)

    def _log(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._last_step = trainer.global_step
        if not computes(trainer) or not trainer.loggers:
            return
        was_training = pl_module.training
        pl_module.eval()
        try:
            with trainer.precision_plugin.forward_context():
                losses = self.losses(pl_module, _data(trainer).datasets)
        finally:
            pl_module.train(was_training)
        self.values, self.values_at = losses, trainer.global_step
        for logger in trainer.loggers:
            logger.log_metrics(
                {f"val/loss_{name}_fixed": loss for name, loss in losses.items()},
                trainer.global_step,
            )

    @torch.no_grad()
    def losses(self, model: LatentDiffusion, datasets: Mapping[str, Any]) -> dict[str, float]:
        """Return the mean loss of the subject and of the prior; the examples are those of the first
        call.
        """
        if self._fixed is None:
            present = {name: datasets[key] for name, key in PARTS.items() if key in datasets}
            self._fixed = {
                name: self._make(model, dataset, name) for name, dataset in present.items()
            }
        return {name: self._loss(model, fixed) for name, fixed in self._fixed.items()}

    def _make(self, model: LatentDiffusion, dataset: Dataset[object], name: str) -> Fixed:
        if isinstance(dataset, (ImageFolderDataset, Together)):
            dataset = dataset.without_augmentation()
        stream = Stream(dataset, self.seed, f"fixed {name}", shuffle=False)
        count = min(self.examples, stream.n_images)
        batches = [stream.batch([number * stream.n_images // count]) for number in range(count)]
        latents = torch.cat([_latents(model, batch) for batch in batches])
        read = [_beside(model, batch) for batch in batches]
        pairs = [(example, step) for example in range(count) for step in range(self.time_steps)]
        seeds = [derive_seed("fixed loss", self.seed, name, *pair) for pair in pairs]
        total = len(model.betas)
        t = torch.tensor([(2 * step + 1) * total // (2 * self.time_steps) for _, step in pairs])
        noise = SampleRandom(seeds).randn((len(pairs), *latents.shape[1:]))
        captions = [batch[model.cond_stage_key][0] for batch in batches]
        return Fixed(latents, captions, t, noise, _joined([found for found in read if found]))

    def _loss(self, model: LatentDiffusion, fixed: Fixed) -> float:
        total = torch.zeros((), device=model.device)
        for start in range(0, len(fixed.t), self.batch_size):
            part = slice(start, start + self.batch_size)
            t, noise = fixed.t[part], fixed.noise[part]
            chosen = [number // self.time_steps for number in range(start, start + len(t))]
            text = model.get_learned_conditioning([fixed.captions[number] for number in chosen])
            cond = with_beside(text, _chosen(fixed.beside, chosen, text))
            x_start, t, noise = (
                value.to(model.device) for value in (fixed.latents[chosen], t, noise)
            )
            total += len(chosen) * model.p_losses(x_start, cond, t, noise)[0]
        return float(total) / len(fixed.t)


def _data(trainer: pl.Trainer) -> Any:
    return trainer.datamodule  # type: ignore[attr-defined]


def _latents(model: LatentDiffusion, batch: Mapping[str, Any]) -> Tensor:
    """Return the scaled modes of a batch's posteriors, on the CPU."""
    if "moments" in batch:
        posterior = DiagonalGaussianDistribution(batch["moments"].float())
    else:
        images = rearrange(batch[model.first_stage_key], "b h w c -> b c h w").contiguous()
        posterior = model.encode_first_stage(images.to(model.device))
    return model.get_first_stage_encoding(posterior.mode()).float().cpu()


def _beside(model: LatentDiffusion, batch: Mapping[str, Any]) -> Beside | None:
    """Return what the UNet reads of a batch beside the noisy latent and the text, on the CPU."""
    images = {key: batch[key].to(model.device) for key in (model.first_stage_key,) if key in batch}
    read = model.beside(model.batch_of({**batch, **images}))
    return None if read is None else {name: value.cpu() for name, value in read.items()}


def _joined(read: Sequence[Beside]) -> Beside | None:
    """Return what the UNet reads of several examples as one; None where it reads text alone."""
    if not read:
        return None
    return {name: torch.cat([one[name] for one in read]) for name in read[0]}


def _chosen(beside: Beside | None, rows: list[int], text: Tensor) -> Beside | None:
    """Return some examples' rows, where the text is, and numbers that are no levels as it is."""
    if beside is None:
        return None
    found = {name: value[rows].to(text.device) for name, value in beside.items()}
    return {n: v.to(text.dtype) if v.is_floating_point() else v for n, v in found.items()}
