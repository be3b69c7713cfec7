"""Latent diffusion: the wiring of UNet, autoencoder, text encoder, schedule and objective."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import pytorch_lightning as pl
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer

from ldm.errors import ParameterError
from ldm.models.diffusion.conditioning import Cond, DiffusionWrapper, as_mapping
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.parameterization import PARAMETERIZATIONS, Parameterization
from ldm.models.diffusion.schedule import Latent, NoiseSchedule, Steps, with_zero_terminal_snr
from ldm.models.diffusion.trained import TextEncoderTraining, check_same_parameters, check_strategy, fitting, freeze
from ldm.modules.adapters import (
    TEXT_LAYERS,
    UNET_LAYERS,
    adaptable_weights,
    add_adapters,
    check_adaptable,
    lora_options,
)
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.ema import LitEma
from ldm.modules.losses.diffusion import PriorPreservation, per_sample_loss, place_weights, split_like, with_offset
from ldm.optim.boundary import at_step_boundary
from ldm.optim.registry import Part, make_optimizer
from ldm.optim.schedules import with_schedule
from ldm.rng import SampleRandom, derive_seed
from ldm.util import instantiate_from_config

log = logging.getLogger(__name__)

Images = Float[Tensor, "b 3 height width"]
Batch = Mapping[str, Any] | Sequence[Mapping[str, Any]]


class LatentDiffusion(pl.LightningModule):
    """A text-to-image diffusion model in the latent space of an autoencoder (Rombach et al., 2112.10752).

    Args:
        unet_config, first_stage_config, cond_stage_config: `target` and `params` of the three networks.
        reg_weight: weight of the prior-preservation loss.
        timesteps, beta_schedule, linear_start, linear_end, cosine_s: see `NoiseSchedule.create`.
        parameterization: what the UNet predicts: eps, x0 or v.
        loss_type: l2 or l1.
        original_elbo_weight: weight of the variational bound in the loss, beside 1 for the simple loss.
        scale_factor: multiplies latents, so that they have about unit variance.
        cond_stage_trainable: train the text encoder together with the UNet.
        text_encoder_lr: the text encoder's learning rate, if not the UNet's; --scale_lr multiplies it, too.
        text_encoder_stop: the number of optimizer steps after which the text encoder stays as it is.
        freeze: patterns (`*`, `?`, `[...]`) of names of trained parameters that are not to be; with `lora`, of the
            weights whose adapters are not.
        conditioning_key: crossattn, concat or hybrid.
        image_size: side of the latents that it is made for.
        use_ema: keep an exponential moving average of the UNet's weights.
        first_stage_key, cond_stage_key: a batch's entries for the image and the caption.
        monitor: the metric that names the best checkpoint.
        min_snr_gamma: weight the loss of each time step as min-SNR does (2303.09556); None weights all alike.
        caption_dropout: share of captions that training empties, for classifier-free guidance (2207.12598); with a
            prior, of its captions alone.
        offset_noise: strength of a random constant for each sample and channel in the noise.
        zero_terminal_snr: rescale the schedule so that its last step is noise alone (2305.08891); for parameterization
            v. A base model's schedule is rescaled, too.
        unmasked_weight: weight of what a mask leaves black, from 0 to 1; white has 1.
        ema_decay: of the average that `use_ema` keeps.
        optimizer: adamw; adamw8bit, whose state is a quarter; either with _in_backward, which keeps no gradients (see
            `InBackward`); adam; muon.
        scheduler_config: a function from step to a factor for the learning rate, see `ldm.optim.schedules`.
        lora: `rank` and `alpha` of adapters on the UNet's attention and, with `cond_stage_trainable`, the text
            encoder's, which are trained instead of the model's own weights.

    The learning rate is the attribute `learning_rate`, which the training command sets.
    """

    learning_rate: float = 1e-6
    config_keys = tuple(NoiseSchedule.names())  # of a checkpoint: what the config alone determines
    betas: Tensor
    lvlb_weights: Tensor
    first_stage_model: Any
    cond_stage_model: Any

    def __init__(
        self,
        unet_config: Mapping[str, Any],
        first_stage_config: Mapping[str, Any],
        cond_stage_config: Mapping[str, Any],
        reg_weight: float = 1.0,
        timesteps: int = 1000,
        beta_schedule: str = "linear",
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
        parameterization: str = "eps",
        loss_type: str = "l2",
        original_elbo_weight: float = 0.0,
        scale_factor: float = 1.0,
        cond_stage_trainable: bool = False,
        text_encoder_lr: float | None = None,
        text_encoder_stop: int | None = None,
        freeze: Sequence[str] | None = None,
        conditioning_key: str = "crossattn",
        use_ema: bool = True,
        first_stage_key: str = "image",
        cond_stage_key: str = "caption",
        monitor: str | None = None,
        min_snr_gamma: float | None = None,
        caption_dropout: float = 0.0,
        offset_noise: float = 0.0,
        zero_terminal_snr: bool = False,
        unmasked_weight: float = 0.0,
        ema_decay: float = 0.9999,
        optimizer: str = "adamw",
        scheduler_config: Mapping[str, Any] | None = None,
        lora: Mapping[str, Any] | None = None,
        image_size: int = 64,
    ):
        super().__init__()
        if parameterization not in PARAMETERIZATIONS:
            accepted = ", ".join(PARAMETERIZATIONS)
            raise ParameterError("parameterization", f"unknown '{parameterization}'; accepted: {accepted}")
        self.parameterization: Parameterization = PARAMETERIZATIONS[parameterization]
        shares = {"caption_dropout": caption_dropout, "ema_decay": ema_decay, "unmasked_weight": unmasked_weight}
        _check_options(shares, min_snr_gamma, offset_noise)
        _check_terminal(zero_terminal_snr, parameterization)
        self.objective = PriorPreservation(reg_weight)
        self.min_snr_gamma, self.caption_dropout = min_snr_gamma, caption_dropout
        self.offset_noise, self.zero_terminal_snr = offset_noise, zero_terminal_snr
        self.unmasked_weight = unmasked_weight
        self.optimizer, self.scheduler_config = optimizer, scheduler_config
        self.loss_type = loss_type
        self.original_elbo_weight = original_elbo_weight
        self.scale_factor = scale_factor
        self.cond_stage_trainable = cond_stage_trainable
        self.text_training = TextEncoderTraining(text_encoder_lr, text_encoder_stop)
        self.freeze_patterns = freeze or ()
        self.text_training.check(cond_stage_trainable)
        self._text_encoder_stopped = False
        self.first_stage_key = first_stage_key
        self.cond_stage_key = cond_stage_key
        self.monitor = monitor
        self.image_size = image_size

        schedule = NoiseSchedule.create(timesteps, beta_schedule, linear_start, linear_end, cosine_s, zero_terminal_snr)
        for name in NoiseSchedule.names():
            self.register_buffer(name, getattr(schedule, name))
        self.register_buffer("lvlb_weights", self.parameterization.vlb_weights(schedule), persistent=False)

        self.model = DiffusionWrapper(unet_config, conditioning_key)
        self.first_stage_model = instantiate_from_config(first_stage_config, "first_stage_config")
        self.cond_stage_model = instantiate_from_config(cond_stage_config, "cond_stage_config")
        self.first_stage_model.requires_grad_(False)
        self.cond_stage_model.requires_grad_(cond_stage_trainable)
        self.lora, self._adapted = None if lora is None else lora_options(lora), False
        if self.lora:
            check_adaptable(self.cond_stage_model if cond_stage_trainable else None, use_ema)
        self._freeze()
        self.model_ema = LitEma(self.model, ema_decay) if use_ema else None  # of what is trained
        self.train(self.training)

    # Modules and their state

    def _freeze(self) -> None:
        """Freeze what the patterns fit: now, or, as adapters are not there yet, in `configure_model`."""
        others = {name for name, parameter in self.named_parameters() if not parameter.requires_grad}
        trained = {name for name, _ in self.named_parameters()} - others
        if self.lora:
            trained = set(adaptable_weights(self.model, UNET_LAYERS, "model."))
            if self.cond_stage_trainable:
                trained |= set(adaptable_weights(self.cond_stage_model, TEXT_LAYERS, "cond_stage_model."))
            others = {name for name, _ in self.named_parameters()} - trained
        self._frozen = fitting(self.freeze_patterns, trained, others)
        if not self.lora:
            freeze(self, self._frozen)

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule, of the buffers as they are now (a checkpoint's, on this device)."""
        return NoiseSchedule(**{name: getattr(self, name) for name in NoiseSchedule.names()})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A base model's schedule becomes one with zero terminal SNR where the config asks for that."""
        betas = state_dict.get(f"{prefix}betas")
        if self.zero_terminal_snr and betas is not None and betas[-1] < 1:
            schedule = NoiseSchedule.of_betas(with_zero_terminal_snr(betas.double().cpu().numpy()))
            state_dict |= {prefix + name: getattr(schedule, name) for name in NoiseSchedule.names()}
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        return self.first_stage_model.embed_dim

    @property
    def downsampling(self) -> int:
        """Pixels of an image's side for each one of its latent."""
        return self.first_stage_model.downsampling

    def train(self, mode: bool = True) -> LatentDiffusion:
        """Frozen networks stay in evaluation mode."""
        super().train(mode)
        self.first_stage_model.eval()
        self.cond_stage_model.train(mode and self.text_trains)
        return self

    @property
    def text_trains(self) -> bool:
        """Whether the text encoder is trained, and has not come to its `text_encoder_stop`."""
        return self.cond_stage_trainable and not self._text_encoder_stopped

    @contextmanager
    def ema_scope(self, context: str | None = None) -> Iterator[None]:
        """Inside, the UNet has its averaged weights, if it keeps any; `context` names the use in the log."""
        with self.model_ema.swapped_in(self.model) if self.model_ema else nullcontext():
            if self.model_ema and context:
                log.debug("%s: with the EMA weights", context)
            yield

    # Images, text and the UNet

    def encode_first_stage(self, x: Images) -> DiagonalGaussianDistribution:
        """The posterior over latents of images in [-1, 1]."""
        with torch.no_grad():
            return self.first_stage_model.encode(x)

    def get_first_stage_encoding(
        self, posterior: DiagonalGaussianDistribution | Tensor, noise: Tensor | None = None
    ) -> Latent:
        """A scaled latent: a sample of the posterior, with `noise` if given; a tensor is only scaled."""
        z = posterior if isinstance(posterior, Tensor) else posterior.sample(noise)
        return self.scale_factor * z

    @torch.no_grad()
    def decode_first_stage(self, z: Latent) -> Images:
        """Images, about in [-1, 1], of scaled latents."""
        return self.first_stage_model.decode(z / self.scale_factor)

    def get_learned_conditioning(self, c: Sequence[str]) -> Float[Tensor, "b n d"]:
        """Embeddings of captions; with gradients if the text encoder is trained."""
        with nullcontext() if self.text_trains else torch.no_grad():
            return self.cond_stage_model(list(c))

    def apply_model(self, x_noisy: Latent, t: Steps, cond: Cond) -> Latent:
        """The UNet's output for noisy latents at time steps `t`."""
        return self.model(x_noisy, t, **as_mapping(cond, self.model.conditioning_key))

    # The forward process and its inverse

    def q_sample(self, x_start: Latent, t: Steps, noise: Tensor | None = None) -> Latent:
        """Noisy latents at time steps `t`."""
        return self.schedule.q_sample(x_start, t, torch.randn_like(x_start) if noise is None else noise)

    def predict_start_from_noise(self, x_t: Latent, t: Steps, noise: Latent) -> Latent:
        """The clean latents that `noise` implies."""
        return self.schedule.start_from_noise(x_t, t, noise)

    # The objective

    def _losses(
        self, x_start: Latent, cond: Cond, t: Steps, noise: Latent, weights: Float[Tensor, "b h w"] | None = None
    ) -> dict[str, Tensor]:
        """For each sample, (b,): the loss, and in it the simple loss and the term of the variational bound.

        With `weights` of places, all of them are of weighted means.
        """
        schedule = self.schedule
        output = self.apply_model(schedule.q_sample(x_start, t, noise), t, cond)
        target = self.parameterization.target(schedule, x_start, t, noise)
        simple = per_sample_loss(output, target, self.loss_type, weights)
        vlb = self.lvlb_weights[t] * simple
        weighted = simple
        if self.min_snr_gamma is not None:
            weighted = simple * self.parameterization.min_snr_weight(schedule, t, self.min_snr_gamma)
        return {"loss_simple": simple, "loss_vlb": vlb, "loss": weighted + self.original_elbo_weight * vlb}

    def p_losses(
        self, x_start: Latent, cond: Cond, t: Steps, noise: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one batch of scaled latents, and its parts for the log."""
        noise = torch.randn_like(x_start) if noise is None else noise
        prefix = "train" if self.training else "val"
        means = {name: value.mean() for name, value in self._losses(x_start, cond, t, noise).items()}
        return means["loss"], {f"{prefix}/{name}": value.detach() for name, value in means.items()}

    def shared_step(self, batch: Batch, prefix: str) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a subject batch, or of a (subject, prior) pair, in one pass of every network."""
        halves = self.objective.halves(batch)
        posterior = self._posterior(halves)
        draws = [self._draw(half, posterior.mean.shape[1:]) for half in halves]
        eps, t, noise = (torch.cat(parts) for parts in zip(*draws))
        # With a prior only the class images' captions are dropped: guidance away from an unconditional model that has
        # learned the subject would drive the class away from it.
        dropping = [prefix == "train" and half is halves[-1] for half in halves]
        captions = [caption for half, drops in zip(halves, dropping) for caption in self._captions(half, drops)]
        x_start = self.get_first_stage_encoding(posterior, eps)
        masks = [half.get("mask") for half in halves]
        weights = place_weights(masks, [eps for eps, _, _ in draws], self.unmasked_weight)
        losses = self._losses(x_start, self._embeddings(captions), t, noise, weights)

        steps = [t for _, t, _ in draws]
        means = {name: [part.mean() for part in split_like(value, steps)] for name, value in losses.items()}
        loss = self.objective.combine(means["loss"])
        logged = {f"{prefix}/{name}": parts[0].detach() for name, parts in means.items()}
        if len(halves) > 1:
            logged[f"{prefix}/loss_prior"] = means["loss"][1].detach()
        logged[f"{prefix}/loss_total"] = loss.detach()
        return loss, logged

    def _posterior(self, halves: Sequence[Mapping[str, Any]]) -> DiagonalGaussianDistribution:
        """Of all the halves' images, encoded now or, as `moments`, when a latent cache was made."""
        if "moments" in halves[0]:
            return DiagonalGaussianDistribution(torch.cat([half["moments"] for half in halves]).float())
        images = torch.cat([half[self.first_stage_key] for half in halves])
        return self.encode_first_stage(rearrange(images, "b h w c -> b c h w").contiguous())

    def _embeddings(self, captions: Sequence[str]) -> Float[Tensor, "b n d"]:
        """Embeddings of captions, most of which are the same: the text encoder reads each distinct one once."""
        distinct = list(dict.fromkeys(captions))
        rows = torch.tensor([distinct.index(caption) for caption in captions], device=self.device)
        return self.get_learned_conditioning(distinct)[rows]

    def _draw(self, half: Mapping[str, Any], latent_shape: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Posterior noise, time steps and diffusion noise of a half, a function of its samples' seeds."""
        batch = len(half[self.cond_stage_key])
        random = SampleRandom(half.get("noise_seed"), self.device)
        eps, t = random.randn((batch, *latent_shape)), random.randint(len(self.betas), batch)
        noise = random.randn((batch, *latent_shape))
        return eps, t, with_offset(noise, self.offset_noise, half.get("noise_seed"))

    def _captions(self, half: Mapping[str, Any], dropout: bool) -> list[str]:
        """A half's captions, with `dropout` some of them empty, which ones being a function of their seeds."""
        captions = list(half[self.cond_stage_key])
        if not dropout or self.caption_dropout == 0:
            return captions
        seeds = half.get("noise_seed")
        random = SampleRandom(None if seeds is None else [derive_seed("caption", int(seed)) for seed in seeds])
        dropped = random.rand(len(captions)) < self.caption_dropout
        return ["" if drop else caption for drop, caption in zip(dropped, captions)]

    # Lightning

    def configure_model(self) -> None:
        """Give the UNet its memory format; freeze the model and add the adapters that `lora` asks for, once.

        Not in `__init__`: initial weights come without adapters, in their own format. Lightning calls this before it
        restores a checkpoint, which has them.
        """
        if hasattr(self.model.diffusion_model, "use_memory_format"):
            self.model.diffusion_model.use_memory_format()
        if self.lora is None or self._adapted:
            return
        self.requires_grad_(False)
        add_adapters(self.model.diffusion_model, UNET_LAYERS, self.lora)
        if self.cond_stage_trainable:
            add_adapters(self.cond_stage_model, TEXT_LAYERS, self.lora)
        freeze(self, self._frozen)
        self._adapted = True

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Raise a `UserError` if a run goes on with another model than its checkpoint's."""
        from ldm.checkpoints.loading import compare

        compare(self, checkpoint["state_dict"], "the checkpoint to go on from")
        trained = sum(parameter.requires_grad for parameter in self.parameters())
        groups = [part.get("name") if isinstance(part, Mapping) else None for part in self._parts()]
        check_same_parameters(checkpoint, groups, trained, self.freeze_patterns)

    def on_fit_start(self) -> None:
        if self.text_training.stop is not None:
            check_strategy(self.trainer.strategy)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss, logged = self.shared_step(batch, "train")
        size = len(self.objective.halves(batch)[0][self.cond_stage_key])
        shown: dict[str, Any] = {key: logged.pop(key) for key in ("train/loss", "train/loss_prior") if key in logged}
        self.log_dict(shown, prog_bar=True, batch_size=size)
        self.log_dict(logged, batch_size=size)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluation_step(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluation_step(batch, "test")

    @torch.no_grad()
    def _evaluation_step(self, batch: Batch, prefix: str) -> None:
        """Log the losses, and those of the averaged weights behind `_ema` (the same without an EMA)."""
        _, logged = self.shared_step(batch, prefix)
        averaged = logged
        if self.model_ema:
            with self.ema_scope():
                _, averaged = self.shared_step(batch, prefix)
        logged = logged | {f"{name}_ema": value for name, value in averaged.items()}
        size = len(self.objective.halves(batch)[0][self.cond_stage_key])
        self.log_dict(logged, on_step=False, on_epoch=True, batch_size=size, sync_dist=True)

    def metric_names(self, has_prior: bool) -> dict[str, list[str]]:
        """Return the metrics that a training logs: those of every step, and those of a validation."""
        names = ["loss_simple", "loss_vlb", "loss", *(["loss_prior"] if has_prior else []), "loss_total"]
        validation = [f"val/{name}{averaged}" for averaged in ("", "_ema") for name in names]
        return {"train": [f"train/{name}" for name in names], "val": validation}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        # Here and not at the batch's end: a checkpoint written there must hold this step's averages.
        if self.model_ema:
            self.model_ema(self.model)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        if self.text_trains and self.text_training.stop is not None and self.global_step >= self.text_training.stop:
            self._stop_text_encoder()

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Free a step's gradients: Lightning would keep them beside the next forward pass's activations."""
        if at_step_boundary(self.trainer, batch_idx):
            cast(Optimizer, self.optimizers()).zero_grad()

    def _stop_text_encoder(self) -> None:
        """From here on no gradient is computed for it; what has none is left alone by every optimizer."""
        self._text_encoder_stopped = True
        self.cond_stage_model.requires_grad_(False).eval()
        for parameter in self.cond_stage_model.parameters():
            parameter.grad = None
        log.info("step %d: the text encoder stays as it is from here on", self.global_step)

    def _parts(self) -> Sequence[Part]:
        """What is trained: in one parameter group, or in two where the text encoder has its own learning rate."""
        if not self.cond_stage_trainable:
            return [self.model]
        if self.text_training.lr is None:
            return [self.model, self.cond_stage_model]
        text_encoder = {"name": "text_encoder", "modules": [self.cond_stage_model], "lr": self.text_training.lr}
        return [{"name": "unet", "modules": [self.model]}, text_encoder]

    def configure_optimizers(self) -> Any:
        """One optimizer over the UNet and, if it is trained, the text encoder."""
        options = {"fused": False} if self.optimizer in ("adam", "adamw") and _clips_scaled(self._trainer) else {}
        optimizer = make_optimizer(self.optimizer, self._parts(), self.learning_rate, **options)
        max_steps = -1 if self._trainer is None else self.trainer.max_steps
        return with_schedule(optimizer, self.scheduler_config, max_steps)

    @torch.no_grad()
    def log_images(
        self,
        batch: Batch,
        N: int = 4,
        sample: bool = True,
        ddim_steps: int = 50,
        ddim_eta: float = 0.0,
        unconditional_guidance_scale: float = 7.5,
        seed: int = 0,
    ) -> dict[str, Images]:
        """Pictures of up to `N` images of each half: inputs, reconstructions and samples for their captions."""
        halves = self.objective.halves(batch)
        halves = [{key: value[:N] for key, value in half.items()} for half in halves]
        captions = [caption for half in halves for caption in half[self.cond_stage_key]]
        z = self.get_first_stage_encoding(self._posterior(halves).mode())
        pictures = {"reconstruction": self.decode_first_stage(z)}
        if all(self.first_stage_key in half for half in halves):
            inputs = torch.cat([half[self.first_stage_key] for half in halves])
            pictures = {"inputs": rearrange(inputs, "b h w c -> b c h w").contiguous(), **pictures}
        if sample:
            with self.ema_scope("samples"):
                latents, _ = DDIMSampler(self).sample(
                    ddim_steps,
                    len(captions),
                    z.shape[1:],
                    self.get_learned_conditioning(captions),
                    eta=ddim_eta,
                    verbose=False,
                    unconditional_guidance_scale=unconditional_guidance_scale,
                    unconditional_conditioning=self.get_learned_conditioning([""] * len(captions)),
                    random=SampleRandom(range(seed, seed + len(captions)), self.device),
                )
            pictures["samples"] = self.decode_first_stage(latents)
        return pictures


def _clips_scaled(trainer: Any) -> bool:
    """Whether Lightning has to unscale fp16's gradients to clip them, which fused kernels do themselves."""
    return trainer is not None and trainer.precision == "16-mixed" and bool(trainer.gradient_clip_val)


def _check_options(shares: Mapping[str, float], min_snr_gamma: float | None, offset_noise: float) -> None:
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise ParameterError(name, f"expected a share from 0 to 1, got {value}")
    if min_snr_gamma is not None and min_snr_gamma <= 0:
        raise ParameterError("min_snr_gamma", f"expected a positive number, got {min_snr_gamma}")
    if not 0 <= offset_noise < math.inf:
        raise ParameterError("offset_noise", f"expected 0 or more, got {offset_noise}")


def _check_terminal(zero_terminal_snr: bool, parameterization: str) -> None:
    if zero_terminal_snr and parameterization != "v":
        raise ParameterError(
            "zero_terminal_snr",
            f"needs parameterization: v, got {parameterization}: of noise alone, its noise is known and says nothing "
            "about the image",
        )
