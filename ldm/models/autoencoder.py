"""The first stage: a variational autoencoder between images and the latents of diffusion."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from ldm.errors import ParameterError, UserError, check_counts, under
from ldm.models.tiles import tiled
from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.named_weights import NamedWeights
from ldm.optim.registry import make_optimizer
from ldm.optim.schedules import with_schedule
from ldm.rng import SampleRandom
from ldm.util import check_params, instantiate_from_config

Images = Float[Tensor, "b c h w"]
Latent = Float[Tensor, "b z hz wz"]
BETAS = (0.5, 0.9)  # of both Adams


class AutoencoderKL(pl.LightningModule):
    """Encoder, decoder and a normal posterior in between (Rombach et al., 2112.10752, section 3.1).

    Args:
        ddconfig: the shape of `Encoder` and `Decoder`.
        lossconfig: `ldm.modules.losses.LPIPSWithDiscriminator` to train it, `torch.nn.Identity` to
            use it.
        embed_dim: channels of a latent.
        ckpt_path: a file of initial weights, for who builds the model
            (`ldm.checkpoints.parts.load_parts`); keys that start with one of `ignore_keys` stay.
            Until then it refuses to compute.
        image_key: a batch's entry for the images, (b, h, w, c) in [-1, 1].
        monitor: the metric that names the best checkpoint.
        use_checkpoint: recompute the residual blocks' activations in the backward pass.
        optimizer: adam or muon, for the autoencoder; the discriminator has Adam.
        freeze_encoder: train the decoder alone: what was trained on its latents stays valid.
        scheduler_config: a function from step to a factor for the autoencoder's learning rate.

    On several GPUs, train with `strategy: ddp_find_unused_parameters_true`: no backward pass
    reaches both the autoencoder and the discriminator. The learning rate is the attribute
    `learning_rate`, which the training command sets.

    Raises:
        UserError: `ddconfig` does not fit the encoder and the decoder, or has no `double_z`.
    """

    learning_rate: float = 4.5e-6
    optional_keys = ("loss.",)  # a first stage out of a latent diffusion model has no discriminator

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        lossconfig: Mapping[str, Any],
        embed_dim: int,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        image_key: str = "image",
        monitor: str | None = None,
        use_checkpoint: bool = False,
        optimizer: str = "adam",
        scheduler_config: Mapping[str, Any] | None = None,
        freeze_encoder: bool = False,
    ):
        super().__init__()
        if not ddconfig.get("double_z", True):
            raise ParameterError(
                "ddconfig.double_z", "must be true, the posterior has a mean and a variance"
            )
        check_counts(embed_dim=embed_dim)
        params = {"use_checkpoint": use_checkpoint, **ddconfig}
        check_params(Encoder, params, "ddconfig")
        with under("ddconfig"):
            self.encoder, self.decoder = Encoder(**params), Decoder(**params)
        self.quant_conv = nn.Conv2d(2 * ddconfig["z_channels"], 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)
        self.loss = instantiate_from_config(lossconfig, "lossconfig")
        self.embed_dim = embed_dim
        self.image_key = image_key
        self.monitor = monitor
        self.optimizer, self.scheduler_config = optimizer, scheduler_config
        for part in (self.encoder, self.quant_conv):
            part.requires_grad_(not freeze_encoder)
        self.downsampling = 2 ** (len(ddconfig["ch_mult"]) - 1)
        # Lightning steps several optimizers only by hand.
        self.automatic_optimization = False
        self.ckpt_path, self.ignore_keys = ckpt_path, tuple(ignore_keys)
        self.named_weights = NamedWeights(self, ckpt_path, (self.encoder, self.decoder))
        # For large pictures: the side of tiles, in latents, and whether each is decoded alone.
        self.tile: int | None = None
        self.slices = False

    # Images and latents

    def encode(self, x: Images) -> DiagonalGaussianDistribution:
        """Return the posterior over latents of images in [-1, 1]."""
        grid = (x.shape[2] // self.downsampling, x.shape[3] // self.downsampling)
        if self.tile is None or max(grid) <= self.tile:
            return DiagonalGaussianDistribution(self._moments(x))
        return DiagonalGaussianDistribution(tiled(self.encoder, self._moments, x, grid, self.tile))

    def _moments(self, x: Images) -> Tensor:
        return self.quant_conv(self.encoder(x))

    def decode(self, z: Latent) -> Images:
        """Return images, about in [-1, 1], of latents."""
        if self.slices and len(z) > 1:
            return torch.cat([self.decode(one) for one in z.split(1)])
        grid = (z.shape[2], z.shape[3])
        if self.tile is None or max(grid) <= self.tile:
            return self._pixels(z)
        return tiled(self.decoder, self._pixels, z, grid, self.tile, self.downsampling)

    def _pixels(self, z: Latent) -> Images:
        return self.decoder(self.post_quant_conv(z))

    @torch.no_grad()
    def whiten(self, mean: Float[Tensor, " z"], covariance: Float[Tensor, "z z"]) -> None:
        """Give latents of this mean and covariance zero mean and uncorrelated unit variance.

        The change goes into the convolutions on both sides of the latents: reconstructions stay as
        they are. A log variance becomes the mean of those that its channel mixes, plus the gain,
        which bounds the true one from below.
        """
        # The symmetric root of the inverse covariance changes the channels as little as possible.
        values, vectors = torch.linalg.eigh(covariance.double())
        whitening = vectors @ torch.diag(values.rsqrt()) @ vectors.T
        mean, squares, channels = mean.double(), whitening.square(), len(mean)
        # The encoder's last convolution gives means, which mix, and log variances, whose mean is
        # taken.
        gain = squares.sum(1)
        mixing = torch.block_diag(whitening, squares / gain[:, None])
        shift = torch.cat([-whitening @ mean, gain.log()])
        inward, outward = self.quant_conv, self.post_quant_conv
        into = inward.weight.double().flatten(1)
        outof = outward.weight.double().flatten(1)
        assert channels == self.embed_dim and inward.bias is not None and outward.bias is not None
        inward.bias.copy_(mixing @ inward.bias.double() + shift)
        inward.weight.copy_((mixing @ into).view_as(inward.weight))
        outward.bias.copy_(outof @ mean + outward.bias.double())
        outward.weight.copy_((outof @ whitening.inverse()).view_as(outward.weight))

    def forward(
        self, x: Images, sample_posterior: bool = True
    ) -> tuple[Images, DiagonalGaussianDistribution]:
        """Return reconstructions of a sample or of the mode of the posterior, and the posterior."""
        posterior = self.encode(x)
        z = posterior.sample() if sample_posterior else posterior.mode()
        return self.decode(z), posterior

    def get_last_layer(self) -> Tensor:
        """Return the weights whose gradients balance the adversarial loss."""
        return self.decoder.conv_out.weight

    def get_input(self, batch: Mapping[str, Any]) -> Images:
        """Return a batch's images, channels first.

        Raises:
            UserError: there are none, or of a size that does not come back from the latents.
        """
        if self.image_key not in batch:
            raise UserError(
                f"image_key: no '{self.image_key}' in the batch, which has "
                f"{', '.join(map(str, batch))}"
            )
        x = rearrange(batch[self.image_key], "b h w c -> b c h w").contiguous()
        if any(side % self.downsampling for side in x.shape[2:]):
            height, width = x.shape[2:]
            raise UserError(
                f"images of {width}x{height} pixels: both must be multiples of {self.downsampling}"
            )
        return x

    # Training

    def configure_optimizers(self) -> Any:
        if isinstance(self.loss, nn.Identity):
            raise UserError(
                "lossconfig: torch.nn.Identity cannot train an autoencoder; "
                "use target: ldm.modules.losses.LPIPSWithDiscriminator"
            )
        parts = (self.encoder, self.decoder, self.quant_conv, self.post_quant_conv)
        autoencoder = make_optimizer(self.optimizer, parts, self.learning_rate, betas=BETAS)
        adversary = torch.optim.Adam(
            self.loss.discriminator.parameters(), lr=self.learning_rate, betas=BETAS
        )
        if self.scheduler_config is None:
            return autoencoder, adversary
        return with_schedule(autoencoder, self.scheduler_config), {"optimizer": adversary}

    def on_train_start(self) -> None:
        # Lightning proposes to save the weights from before a manual step; those after it resume.
        warnings.filterwarnings(
            "ignore", "Using ModelCheckpoint with manual optimization", UserWarning
        )

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Take a step of the autoencoder, then one of the discriminator on its reconstructions."""
        step = self.global_step
        x = self.get_input(batch)

        # One forward pass for both steps.
        posterior = self.encode(x)
        noise = SampleRandom(batch.get("noise_seed"), self.device).randn(posterior.mean.shape)
        reconstruction = self.decode(posterior.sample(noise))

        # The autoencoder first, against the discriminator as it is; then the discriminator, against
        # what the autoencoder made before its own step.
        logged = self._step_autoencoder(x, reconstruction, posterior, step)
        if self.loss.discriminates(step):
            logged |= self._step_discriminator(x, reconstruction)
        for name, value in logged.items():
            self.log(
                name, value, prog_bar=name == "train/rec_loss", on_step=True, batch_size=len(x)
            )

    def _step_autoencoder(
        self, x: Images, reconstruction: Images, posterior: DiagonalGaussianDistribution, step: int
    ) -> dict[str, Tensor]:
        optimizer = self.optimizers()[0]  # type: ignore[index]
        # Inside, no gradients are computed for the discriminator's weights.
        self.toggle_optimizer(optimizer)
        loss, logged = self.loss.generator_loss(
            x, reconstruction, posterior, step, self.get_last_layer()
        )
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.untoggle_optimizer(optimizer)
        schedule = self.lr_schedulers()
        if schedule:
            schedule.step()  # type: ignore[union-attr,call-arg]
        return logged

    def _step_discriminator(self, x: Images, reconstruction: Images) -> dict[str, Tensor]:
        optimizer = self.optimizers(use_pl_optimizer=False)[1]  # type: ignore[index]
        loss, logged = self.loss.discriminator_loss(x, reconstruction)
        optimizer.zero_grad()
        self.manual_backward(loss)
        # Lightning's wrapper would count this as another training step. The strategy's method is
        # what the wrapper calls: precision plugins (fp16's gradient scaler) and hooks still apply.
        self.trainer.strategy.optimizer_step(optimizer, closure=lambda: None)
        return logged

    def validation_step(self, batch: Mapping[str, object], batch_idx: int) -> None:
        """Log losses and image metrics of reconstructions of the mode, so that epochs compare."""
        x = self.get_input(batch)
        reconstruction, posterior = self(x, sample_posterior=False)
        logged = image_metrics(reconstruction, x, "val")
        if not isinstance(self.loss, nn.Identity):
            logged |= self.loss.reconstruction_loss(x, reconstruction, posterior, "val")[2]
        self.log_dict(logged, on_step=False, on_epoch=True, batch_size=len(x), sync_dist=True)

    @torch.no_grad()
    def log_images(
        self, batch: Mapping[str, object], N: int = 8, split: str = "train"
    ) -> dict[str, Images]:
        """Return up to `N` inputs, their reconstructions, and decoded samples of the prior."""
        x = self.get_input(batch)[:N].to(self.device)
        reconstruction, posterior = self(x, sample_posterior=False)
        # The same latents every time, so that pictures of one run compare.
        z = SampleRandom(range(len(x)), self.device).randn(posterior.mean.shape)
        pictures = {"inputs": x, "reconstructions": reconstruction, "samples": self.decode(z.to(x))}
        return {name: images.clamp(-1, 1) for name, images in pictures.items()}


class IdentityFirstStage(nn.Module):
    """No autoencoder: the latents are the images themselves, for diffusion in pixels.

    The name is LDM's.

    Args:
        vq_interface: accepted for LDM's files, without effect.
        channels: of an image.
    """

    downsampling = 1

    def __init__(self, vq_interface: bool = False, channels: int = 3):
        super().__init__()
        check_counts(channels=channels)
        self.embed_dim = channels
        # As of `AutoencoderKL`, without effect.
        self.tile: int | None = None
        self.slices = False

    def encode(self, x: Images) -> DiagonalGaussianDistribution:
        """Return images as a posterior without variance, so that every sample is the image."""
        return DiagonalGaussianDistribution(torch.cat([x, torch.zeros_like(x)], 1), True)

    def decode(self, z: Images) -> Images:
        """Return images as they are."""
        return z


def image_metrics(images: Images, targets: Images, split: str) -> dict[str, Tensor]:
    """Return peak signal-to-noise ratio in dB and structural similarity, means over images."""
    from kornia.metrics import psnr, ssim

    images, targets = ((x.float().clamp(-1, 1) + 1) / 2 for x in (images, targets))
    ratios = [psnr(image, target, max_val=1.0) for image, target in zip(images, targets)]
    return {
        f"{split}/psnr": torch.stack(ratios).mean(),
        f"{split}/ssim": ssim(images, targets, 11).mean(),
    }
