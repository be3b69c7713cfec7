"""Pictures of a batch for the log: its images, what the autoencoder makes of them, and samples."""

from __future__ import annotations

import torch

from ldm.models.diffusion.conditioning import Beside, with_beside
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.interface import CompVisInterface, Images
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.losses.batch import Batch
from ldm.rng import SampleRandom


def preview(
    model: CompVisInterface,
    batch: Batch,
    posterior: DiagonalGaussianDistribution,
) -> dict[str, Images]:
    """Return a batch's images, where it has them, and their reconstructions."""
    # The mode, so that a reconstruction shows what the autoencoder loses and no noise.
    z = model.get_first_stage_encoding(posterior.mode())
    pictures = {} if batch.images is None else {"inputs": batch.images}
    # What no training of the UNet can make better: the autoencoder's own loss of detail.
    return {**pictures, "reconstruction": model.decode_first_stage(z)}


def samples(
    model: CompVisInterface,
    captions: list[str],
    beside: Beside | None,
    latent_shape: torch.Size,
    steps: int,
    eta: float,
    scale: float,
    seed: int,
) -> Images:
    """Return a picture for each caption, drawn with the EMA weights where the model keeps any.

    Args:
        beside: what the UNet reads beside the noisy latents and the text.
    """
    count = len(captions)
    # A seed for each picture: those of one run compare, whatever is sampled beside them.
    random = SampleRandom(range(seed, seed + count), model.device)
    # As users will sample: with the EMA weights and with guidance.
    nothing = model.get_learned_conditioning([""] * count)
    with model.ema_scope("samples"):
        latents, _ = DDIMSampler(model).sample(
            steps,
            count,
            latent_shape,
            with_beside(model.get_learned_conditioning(captions), beside),
            eta=eta,
            verbose=False,
            unconditional_guidance_scale=scale,
            unconditional_conditioning=with_beside(nothing, beside),
            random=random,
        )
    return model.decode_first_stage(latents)
