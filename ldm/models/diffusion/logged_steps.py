"""What Lightning asks of a training, and what is logged of it: losses and pictures."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.models.diffusion.conditioning import Beside
from ldm.models.diffusion.interface import CompVisInterface, Images
from ldm.models.diffusion.preservation import PreservationOptions
from ldm.models.diffusion.preview import preview, samples
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.losses.batch import Batch, RawBatch, named_parts


class LoggedSteps(CompVisInterface):
    """A model whose losses and pictures are logged; a subclass says what a loss is."""

    preservation: PreservationOptions
    first_stage_key: str
    cond_stage_key: str

    @abstractmethod
    def shared_step(self, batch: RawBatch, prefix: str) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a batch, and what to log of it under `prefix`."""

    @abstractmethod
    def beside(self, batch: Batch) -> Beside | None:
        """Return what the UNet reads of a batch beside the noisy latent; None for text alone."""

    @abstractmethod
    def show_beside(self, beside: Beside) -> dict[str, Images]:
        """Return pictures of what the UNet reads beside the noisy latent."""

    def transfer_batch_to_device(
        self, batch: object, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Move a batch, but leave the seeds, with which the processor draws, where they are.

        To read them back from a GPU, it would wait for all that the GPU still has to do.
        """
        # Lightning moves everything; then each part gets its own seeds back.
        moved = super().transfer_batch_to_device(batch, device, dataloader_idx)
        for there, here in zip(_parts(moved), _parts(batch)):
            if "noise_seed" in here:
                there["noise_seed"] = here["noise_seed"]
        return moved

    # The three kinds of steps

    def training_step(self, batch: RawBatch, batch_idx: int) -> Tensor:
        loss, logged = self.shared_step(batch, "train")
        # The progress bar has the two losses to watch, of the subject and of the prior; the log has
        # all. The size is given, because Lightning would have to guess it from a nested batch.
        size = self._size(batch)
        shown = [key for key in ("train/loss", "train/loss_prior") if key in logged]
        self.log_dict({key: logged.pop(key) for key in shown}, prog_bar=True, batch_size=size)
        self.log_dict(logged, batch_size=size)
        return loss

    def validation_step(self, batch: RawBatch, batch_idx: int) -> None:
        self._evaluation_step(batch, "val")

    def test_step(self, batch: RawBatch, batch_idx: int) -> None:
        self._evaluation_step(batch, "test")

    @torch.no_grad()
    def _evaluation_step(self, batch: RawBatch, prefix: str) -> None:
        """Log the losses, and those of the EMA weights behind `_ema` (the same without an EMA)."""
        # Validation examples carry seeds, so both sets of weights see the same noise.
        _, logged = self.shared_step(batch, prefix)
        smoothed = logged
        if self.model_ema:
            with self.ema_scope():
                _, smoothed = self.shared_step(batch, prefix)
        logged = logged | {f"{name}_ema": value for name, value in smoothed.items()}
        size = self._size(batch)
        self.log_dict(logged, on_step=False, on_epoch=True, batch_size=size, sync_dist=True)

    def metric_names(self, has_prior: bool) -> dict[str, list[str]]:
        """Return the metrics that a training logs: of every step, and of a validation."""
        # A way to keep the prior may have a prior loss without class images, or none with them.
        trained = self.objective.metric_names(self.preservation.chosen.has_prior(has_prior))
        names = self.objective.metric_names(has_prior)
        validation = [f"val/{name}{kind}" for kind in ("", "_ema") for name in names]
        return {"train": [f"train/{name}" for name in trained], "val": validation}

    def batch_of(self, batch: RawBatch) -> Batch:
        """Return a data loader's batch, read by the names that the config has for its entries."""
        return Batch.of(batch, self.first_stage_key, self.cond_stage_key)

    def _posterior(self, batch: Batch) -> DiagonalGaussianDistribution:
        """Return the posterior of a batch's images: encoded now, or when latents were cached."""
        # Images that a batch holds twice are encoded once.
        if batch.repeats_subject:
            once = self._posterior(Batch(batch.subject))
            twice = torch.cat([once.parameters, once.parameters])
            return DiagonalGaussianDistribution(twice, once.deterministic)
        moments, images = batch.moments, batch.images
        # With cached latents the autoencoder does not run in a training step.
        if moments is not None:
            return DiagonalGaussianDistribution(moments.float())
        if images is None:
            raise ValueError(f"batch: expected '{self.first_stage_key}' or 'moments' in each part")
        return self.encode_first_stage(images)

    def _size(self, batch: RawBatch) -> int:
        """Return how many examples of the subject a batch has."""
        return len(named_parts(batch)["subject"][self.cond_stage_key])

    # Pictures

    @torch.no_grad()
    def log_images(
        self,
        batch: RawBatch,
        N: int = 4,
        sample: bool = True,
        ddim_steps: int = 50,
        ddim_eta: float = 0.0,
        unconditional_guidance_scale: float = 7.5,
        seed: int = 0,
    ) -> dict[str, Images]:
        """Return pictures of up to `N` images of each part: inputs, reconstructions, samples."""
        shown = self.batch_of(batch).first(N)
        posterior = self._posterior(shown)
        beside = self.beside(shown)
        # First what the autoencoder does to the images, then what the model draws for the captions.
        pictures = preview(self, shown, posterior)
        if beside is not None:
            pictures |= self.show_beside(beside)
        if sample:
            how = (
                posterior.mean.shape[1:],
                ddim_steps,
                ddim_eta,
                unconditional_guidance_scale,
                seed,
            )
            pictures["samples"] = samples(self, shown.captions, beside, *how)
        return pictures


def _parts(batch: Any) -> list[Any]:
    """Return a batch's mappings: of the subject, and of the prior if there is one."""
    parts = [batch] if isinstance(batch, Mapping) else batch
    return [part for part in parts if isinstance(part, Mapping)]
