"""Super-resolution models: their UNet reads a small picture beside the noisy latent of a large one.

The small picture has noise, whose level the UNet is told of (Imagen, 2205.11487, section 2.5). In
the latents of Stable Diffusion's upscaler it is as large as the latent; in pixels it is enlarged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.errors import ParameterError, UserError, check_counts
from ldm.models.diffusion.conditioning import Beside
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.interface import CompVisInterface, Images
from ldm.modules.diffusionmodules.upscaling import ImageConcatWithNoiseAugmentation
from ldm.modules.losses.batch import Batch, Examples, RawBatch
from ldm.rng import SampleRandom, derive_seed
from ldm.util import instantiate_from_config

CONDITIONING = "hybrid-adm"  # the conditioning_key of these models
# Variance of the noise where nothing says another: Imagen's, before DreamBooth lowers it to 1e-5.
AUGMENTATION = 1e-3


def upscales(model: CompVisInterface) -> bool:
    """Return whether a model enlarges a small picture."""
    return model.model.conditioning_key == CONDITIONING


@dataclass(frozen=True)
class SmallImages:
    """The small pictures of a training, and their noise.

    Args:
        factor: how many times as large a picture becomes.
        augmentation: variance of the noise; None draws a level for each example.
    """

    factor: int = 4
    augmentation: float | None = None

    def check(self, model: CompVisInterface, low_scale: ImageConcatWithNoiseAugmentation) -> None:
        """Raise a `UserError` for a UNet that cannot read them, or a noise that no level has."""
        check_counts(upscaling=self.factor)
        if not upscales(model):
            found = model.model.conditioning_key
            raise ParameterError("conditioning_key", f"must be {CONDITIONING}, got {found}")
        # It reads the three colours of the small picture beside the latent.
        unet, wanted = model.model.diffusion_model, model.latent_channels + 3
        if unet.in_channels != wanted:
            problem = f"must be {wanted}, of the latent and the small picture"
            raise ParameterError("unet_config.params.in_channels", problem)
        # It has a vector for each level of the noise, as other models have for classes.
        if (unet.num_classes or 0) < low_scale.max_noise_level:
            problem = f"must be max_noise_level {low_scale.max_noise_level} or more"
            raise ParameterError("unet_config.params.num_classes", problem)
        # A variance stands for the level that has about as much noise.
        if self.augmentation is not None:
            level = low_scale.level_of(self.augmentation)
            if level >= unet.num_classes:
                problem = f"{self.augmentation:g} is level {level} of {unet.num_classes}"
                raise ParameterError("noise_augmentation", problem)

    def of(self, batch: Batch) -> Images:
        """Return the small pictures of a batch: its own, or its images made smaller.

        Raises:
            UserError: it has cached latents alone, or images that the factor does not divide.
        """
        # A dataset of pairs has its own small pictures.
        if batch.small is not None:
            return batch.small
        images = batch.images
        if images is None:
            raise UserError(
                "a super-resolution model reads each image made smaller: it trains on images, not "
                "on cached latents; leave latent_cache out"
            )
        height, width = images.shape[2:]
        # Make the images smaller, by a factor that leaves no part of a pixel over.
        if height % self.factor or width % self.factor:
            raise ParameterError(
                "upscaling", f"{self.factor} does not divide images of {width}x{height} pixels"
            )
        size = height // self.factor, width // self.factor
        # As Pillow does when a photo is made smaller: each pixel is a mean of those it stands for.
        small = F.interpolate(images, size, mode="bicubic", antialias=True)
        return small.clamp(-1, 1)


def training_small(
    model: CompVisInterface,
    low_scale: ImageConcatWithNoiseAugmentation,
    small: SmallImages,
    batch: Batch,
) -> Beside:
    """Return what the UNet reads of a batch: noisy small pictures, and the level of their noise."""
    pictures = small.of(batch)
    # Streams of their own, so that all other draws are the same with and without this noise.
    levels, noise = [], []
    for part in batch.parts:
        shape = (len(part), *pictures.shape[1:])
        noise.append(SampleRandom(_seeds("augmentation noise", part.seeds)).randn(shape))
        levels.append(_levels(low_scale, small, part))
    level = torch.cat(levels).to(pictures.device)
    drawn = torch.cat(noise).to(pictures)
    return read_small(model, low_scale, pictures, small.factor, level, drawn)


def _levels(
    low_scale: ImageConcatWithNoiseAugmentation, small: SmallImages, part: Examples
) -> Tensor:
    """Return the level of each example's noise: the config's, or one that its seed draws."""
    if small.augmentation is not None:
        return torch.full((len(part),), low_scale.level_of(small.augmentation))
    random = SampleRandom(_seeds("augmentation level", part.seeds))
    return random.randint(low_scale.max_noise_level, len(part))


def _seeds(name: str, seeds: Sequence[int] | Tensor | None) -> list[int] | None:
    return None if seeds is None else [derive_seed(name, int(seed)) for seed in seeds]


def read_small(
    model: CompVisInterface,
    low_scale: ImageConcatWithNoiseAugmentation,
    pictures: Images,
    factor: int,
    levels: Tensor,
    noise: Tensor,
) -> Beside:
    """Return small pictures with noise, as large as the latents, and the level of the noise."""
    # Add the noise at the small size, as the model was taught.
    noisy, levels = low_scale(pictures, levels, noise)
    # In pixels the UNet reads them enlarged; in latents they already have the size.
    size = [side * factor // model.downsampling for side in pictures.shape[2:]]
    if list(noisy.shape[2:]) != size:
        noisy = F.interpolate(noisy, size, mode="bilinear")
    return {"c_concat": noisy, "c_adm": levels}


def sampled_level(
    model: CompVisInterface,
    low_scale: ImageConcatWithNoiseAugmentation,
    small: SmallImages,
    augmentation: float | None = None,
) -> int:
    """Return the level of the noise on small pictures that are to be enlarged.

    Args:
        augmentation: its variance; by default that of the training, else `AUGMENTATION`.

    Raises:
        UserError: a level that the UNet never learnt, whose vector has no meaning, or is not there.
    """
    variance = augmentation or small.augmentation or AUGMENTATION
    level = low_scale.level_of(variance)
    most = int(model.model.diffusion_model.num_classes)
    if level >= most:
        problem = f"{variance:g} is level {level}, and the model knows {most}"
        raise UserError(f"noise augmentation: {problem}")
    return level


def sampled_small(
    model: CompVisInterface,
    low_scale: ImageConcatWithNoiseAugmentation,
    small: SmallImages,
    pictures: Images,
    seeds: Sequence[int],
    augmentation: float | None = None,
) -> Beside:
    """Return what the UNet reads of small pictures that are to be enlarged.

    Args:
        seeds: of the pictures' noise.
        augmentation: variance of the noise; by default that of the training, else `AUGMENTATION`.
    """
    level = sampled_level(model, low_scale, small, augmentation)
    # All pictures have one level, and each has noise of its own seed.
    levels = torch.full((len(pictures),), level, device=pictures.device)
    noise = SampleRandom(_seeds("augmentation noise", seeds)).randn(pictures.shape).to(pictures)
    return read_small(model, low_scale, pictures, small.factor, levels, noise)


class LatentUpscaleDiffusion(LatentDiffusion):
    """Draws a picture of a small one and its text: super-resolution, under SD 2's name.

    Args:
        low_scale_config: `target` and `params` of what adds noise to the small picture.
        low_scale_key: a batch's entry for it; where there is none, the image is made smaller.
        upscaling: how many times as large a picture becomes.
        noise_augmentation: variance of that noise in training; None draws levels.
    """

    def __init__(
        self,
        low_scale_config: Mapping[str, Any],
        low_scale_key: str = "LR",
        upscaling: int = 4,
        noise_augmentation: float | None = None,
        **params: Any,
    ):
        super().__init__(**{"conditioning_key": CONDITIONING, **params})
        self.low_scale_model = instantiate_from_config(low_scale_config, "low_scale_config")
        self.low_scale_key, self.small = low_scale_key, SmallImages(upscaling, noise_augmentation)
        # A config whose parts do not fit is refused now, not in the first step.
        self.small.check(self, self.low_scale_model)

    def batch_of(self, batch: RawBatch) -> Batch:
        """Return a data loader's batch, with its small pictures if it has any."""
        return Batch.of(batch, self.first_stage_key, self.cond_stage_key, self.low_scale_key)

    def beside(self, batch: Batch) -> Beside | None:
        """Return the noisy small pictures of a batch, and the level of their noise."""
        return training_small(self, self.low_scale_model, self.small, batch)

    def show_beside(self, beside: Beside) -> dict[str, Images]:
        """Return the small pictures, as the UNet reads them."""
        return {"small": beside["c_concat"].clamp(-1, 1)}
