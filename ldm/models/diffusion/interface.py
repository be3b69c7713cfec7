"""What scripts of the LDM family read and call on a model, under LDM's names.

Samplers, web UIs, ControlNet-like and inversion scripts rely on these names. All of it is thin: the
equations stand in `NoiseSchedule`, what the UNet's output means in `parameterization.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
import torch
from jaxtyping import Float
from torch import Tensor

from ldm.models.autoencoder import AutoencoderKL, IdentityFirstStage
from ldm.models.diffusion.conditioning import Cond, DiffusionWrapper, as_mapping
from ldm.models.diffusion.objective import Objective
from ldm.models.diffusion.schedule import (
    Latent,
    NoiseSchedule,
    Steps,
    at,
    with_zero_terminal_snr,
)
from ldm.models.diffusion.thresholding import Threshold
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.ema import LitEma
from ldm.modules.encoders.modules import TextEncoder

log = logging.getLogger(__name__)

Images = Float[Tensor, "b 3 height width"]


class CompVisInterface(pl.LightningModule):
    """Three networks and a noise schedule, as they are used; of their training only the objective.

    A subclass builds what is listed below, and calls `register_schedule` behind its objective.
    """

    # Of a checkpoint: what the config alone determines, and a file need not have.
    config_keys = tuple(NoiseSchedule.names())
    model: DiffusionWrapper
    model_ema: LitEma | None
    first_stage_model: AutoencoderKL | IdentityFirstStage
    cond_stage_model: TextEncoder
    # (prompts, weighting) -> their embeddings, where a command reads all texts before it draws.
    known_texts: dict[tuple[tuple[str, ...], str | None], Tensor] | None = None
    objective: Objective
    scale_factor: float
    zero_terminal_snr: bool
    threshold: Threshold | None
    betas: Tensor
    lvlb_weights: Tensor

    @property
    def text_trains(self) -> bool:
        """Return whether gradients of the text encoder are wanted."""
        return False

    @property
    def text_has_gradients(self) -> bool:
        """Return whether gradients reach the text encoder, for itself or for new words."""
        return self.text_trains

    def register_schedule(self, schedule: NoiseSchedule) -> None:
        """Keep the schedule's quantities as buffers, under a checkpoint's names."""
        for name in NoiseSchedule.names():
            self.register_buffer(name, getattr(schedule, name))
        # Not saved: it follows from the others and from what the network predicts.
        weights = self.objective.prediction.vlb_weights(schedule)
        self.register_buffer("lvlb_weights", weights, persistent=False)

    @property
    def schedule(self) -> NoiseSchedule:
        """Return the noise schedule of the buffers as they are now, on their device."""
        return NoiseSchedule(**{name: getattr(self, name) for name in NoiseSchedule.names()})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load a state; rescale its schedule where the config asks for zero terminal SNR."""
        # A base model's file brings its own betas, which would undo the rescaling. If its last beta
        # is 1, its schedule was rescaled before.
        betas = state_dict.get(f"{prefix}betas")
        if self.zero_terminal_snr and betas is not None and betas[-1] < 1:
            rescaled = with_zero_terminal_snr(betas.double().cpu().numpy())
            schedule = NoiseSchedule.of_betas(rescaled)
            state_dict |= {prefix + name: getattr(schedule, name) for name in schedule.names()}
        super()._load_from_state_dict(state_dict, prefix, *args)

    # Images, text and the UNet

    def encode_first_stage(self, x: Images) -> DiagonalGaussianDistribution:
        """Return the posterior over latents of images in [-1, 1]."""
        with torch.no_grad():
            return self.first_stage_model.encode(x)

    def get_first_stage_encoding(
        self, posterior: DiagonalGaussianDistribution | Tensor, noise: Tensor | None = None
    ) -> Latent:
        """Return a scaled latent: a sample of the posterior, with `noise` if given, or a tensor."""
        # The scale brings latents to about unit variance, which the noise schedule is made for.
        # LDM's scripts also pass latents that are sampled already.
        z = posterior if isinstance(posterior, Tensor) else posterior.sample(noise)
        return self.scale_factor * z

    @torch.no_grad()
    def decode_first_stage(self, z: Latent) -> Images:
        """Return images, about in [-1, 1], of scaled latents."""
        return self.first_stage_model.decode(z / self.scale_factor)

    def get_learned_conditioning(self, c: str | Sequence[str]) -> Float[Tensor, "b n d"]:
        """Return embeddings of captions, with gradients if the text encoder or its words train."""
        # LDM's scripts may pass one caption as a bare string.
        captions = [c] if isinstance(c, str) else list(c)
        with nullcontext() if self.text_has_gradients else torch.no_grad():
            return self.cond_stage_model(captions)

    def apply_model(
        self, x_noisy: Latent, t: Steps | Float[Tensor, " b"], cond: Cond | None
    ) -> Latent:
        """Return the UNet's output for noisy latents at time steps, which may lie between two."""
        # Scripts pass a conditioning in any of LDM's forms; the UNet takes two lists.
        return self.model(x_noisy, t, **as_mapping(cond, self.model.conditioning_key))

    def get_unconditional_conditioning(
        self, batch_size: int, null_label: str | None = None
    ) -> Float[Tensor, "b n d"]:
        """Return the empty caption's embedding, or that of `null_label`, once for each sample."""
        # Guidance leads away from the empty caption, which is what caption dropout trains (Ho &
        # Salimans). One row stands for all samples, without copies.
        embedding = self.get_learned_conditioning([null_label or ""])
        return embedding.expand(batch_size, -1, -1)

    @contextmanager
    def ema_scope(self, context: str | None = None) -> Iterator[None]:
        """Give the UNet its EMA weights inside, if there are any; `context` is for the log."""
        # DDPM samples from an average of the weights too (appendix B). A model without one is
        # sampled from as it is, so callers need not ask.
        if self.model_ema is None:
            yield
            return
        with self.model_ema.swapped_in(self.model):
            if context:
                log.debug("%s: with the EMA weights", context)
            yield

    # The loss of one batch

    def p_losses(
        self, x_start: Latent, cond: Cond, t: Steps, noise: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of one batch of scaled latents, and its parts for the log."""
        # Scripts of the LDM family call this with latents of their own. These have no seeds, so the
        # noise comes from torch's global generator.
        noise = torch.randn_like(x_start) if noise is None else noise
        prefix = "train" if self.training else "val"
        losses = self._losses(x_start, cond, t, noise)
        means = {name: value.mean() for name, value in losses.items()}
        logged = {f"{prefix}/{name}": value.detach() for name, value in means.items()}
        return means["loss"], logged

    def _losses(
        self, x_start: Latent, cond: Cond, t: Steps, noise: Latent
    ) -> dict[str, Float[Tensor, " b"]]:
        """Return each sample's losses, see `Objective.losses`."""
        raise NotImplementedError

    # What scripts read

    @property
    def parameterization(self) -> str:
        """Return what the UNet predicts: eps, x0 or v. Setting it changes loss and sampling."""
        return self.objective.parameterization

    @parameterization.setter
    def parameterization(self, name: str) -> None:
        # The weights in the variational bound depend on what is predicted, so they follow.
        self.objective = replace(self.objective, parameterization=name)
        self.lvlb_weights = self.objective.prediction.vlb_weights(self.schedule)

    @property
    def num_timesteps(self) -> int:
        """Time steps of the noise schedule."""
        return len(self.betas)

    @property
    def channels(self) -> int:
        """Return the number of channels of a latent."""
        return self.first_stage_model.embed_dim

    @property
    def latent_channels(self) -> int:
        """Return the number of channels of a latent, under our own name."""
        return self.channels

    @property
    def downsampling(self) -> int:
        """Return how many pixels of an image's side one pixel of its latent stands for."""
        return self.first_stage_model.downsampling

    @property
    def use_ema(self) -> bool:
        """Return whether an exponential moving average of the UNet's weights is kept."""
        return self.model_ema is not None

    # The forward process and its inverse

    def q_sample(self, x_start: Latent, t: Steps, noise: Tensor | None = None) -> Latent:
        """Return noisy latents at time steps `t`."""
        # DDPM, eq. 4: any step at once, without the steps before it.
        noise = torch.randn_like(x_start) if noise is None else noise
        return self.schedule.q_sample(x_start, t, noise)

    def q_posterior(
        self, x_start: Latent, x_t: Latent, t: Steps
    ) -> tuple[Latent, Float[Tensor, "b 1 1 1"], Float[Tensor, "b 1 1 1"]]:
        """Return mean, variance and clipped log-variance of q(x_{t-1} | x_t, x_0)."""
        # DDPM, eq. 6 and 7.
        mean, log_variance = self.schedule.q_posterior(x_start, x_t, t)
        return mean, at(self.schedule.posterior_variance, t), log_variance

    def get_v(self, x: Latent, noise: Latent, t: Steps) -> Latent:
        """Return the velocity, which is what a v-model predicts."""
        return self.schedule.velocity(x, t, noise)

    def predict_start_from_noise(self, x_t: Latent, t: Steps, noise: Latent) -> Latent:
        """Return the clean latents that `noise` implies."""
        return self.schedule.start_from_noise(x_t, t, noise)

    def predict_start_from_z_and_v(self, x_t: Latent, t: Steps, v: Latent) -> Latent:
        """Return the clean latents that a velocity implies."""
        return self.schedule.start_from_velocity(x_t, t, v)

    def predict_eps_from_z_and_v(self, x_t: Latent, t: Steps, v: Latent) -> Latent:
        """Return the noise that a velocity implies."""
        return self.schedule.noise_from_velocity(x_t, t, v)
