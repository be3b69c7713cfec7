"""The training steps that ours is compared with, built from a config of ours with weights of no
meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ldm.checkpoints.diffusers_format import scheduler_config, text_config, unet_config, vae_config
from ldm.checkpoints.export import target_of
from ldm.config import IDENTIFIER, RunConfig
from ldm.errors import UserError
from ldm.modules.encoders.modules import recompute_activations
from ldm.util import instantiate_from_config

Images = Float[Tensor, "b 3 height width"]
AUTOCAST: dict[str, torch.dtype | None] = {
    "32-true": None,
    "32": None,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
}


class Reference(Protocol):
    """Something that trains."""

    def step(self) -> None:
        """Take one optimizer step, of as many images as our config's step takes."""


def has_prior(config: Mapping[str, Any]) -> bool:
    """Return whether a step has class images beside those of the subject."""
    return bool(config["data"]["params"].get("reg"))


def autocast_dtype(config: Mapping[str, object]) -> torch.dtype | None:
    """Return the type that the config's precision computes in, or None for float32."""
    precision = str(RunConfig(config).get("lightning.trainer.precision", "32-true"))
    if precision not in AUTOCAST:
        raise UserError(
            f"lightning.trainer.precision: {precision}: measured are {', '.join(AUTOCAST)}"
        )
    return AUTOCAST[precision]


def accumulated(config: Mapping[str, object]) -> int:
    """Return the number of batches in an optimizer step."""
    return int(RunConfig(config).get("lightning.trainer.accumulate_grad_batches", 1))


class Noise:
    """A config's batches: noise for images, subject first, and their captions; ready before the
    clock starts.
    """

    def __init__(self, config: Mapping[str, Any]):
        params = config["data"]["params"]
        self.batch_size = params["batch_size"]
        size = params["train"].get("params", {}).get("size") or 512
        captions = [f"photo of a {IDENTIFIER} dog", *["photo of a dog"] * has_prior(config)]
        self.captions = [caption for caption in captions for _ in range(self.batch_size)]
        self.images = torch.rand(len(self.captions), 3, size, size) * 2 - 1


@dataclass(frozen=True)
class Networks:
    """A config's networks as diffusers and transformers have them, with random weights.

    `embedder` is our text encoder on the meta device: its tokens are theirs. `scheduler` is a
    scheduler's config.
    """

    unet: Any
    vae: Any
    text_encoder: Any
    embedder: Any
    scheduler: dict[str, Any]

    def noise_schedule(self) -> Any:
        """Return the scheduler that adds noise in training."""
        from diffusers import DDPMScheduler

        return DDPMScheduler.from_config(self.scheduler)


def diffusers_networks(config: Mapping[str, Any]) -> Networks:
    """Build them, in float32 on the CPU."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    params = config["model"]["params"]
    with torch.device("meta"):
        ours = instantiate_from_config(target_of(config), "model")
    return Networks(
        UNet2DConditionModel.from_config(
            unet_config(params["unet_config"]["params"], ours.image_size)
        ),
        AutoencoderKL.from_config(
            vae_config(params["first_stage_config"]["params"], ours.scale_factor)
        ),
        CLIPTextModel(CLIPTextConfig(**text_config(ours.cond_stage_model))),
        ours.cond_stage_model,
        scheduler_config(params),
    )


class DiffusersDreamBooth:
    """A step as diffusers' DreamBooth example takes it, with prior preservation and a trained text
    encoder.

    Every step encodes the images of subject and class anew, runs each network once over them, and
    clips the gradient's norm to 1 before AdamW. The autoencoder is in the precision of the
    autocast. With the UNet's `use_checkpoint`, UNet and text encoder recompute their activations;
    with `auto` they keep them, as the example does by default.
    """

    def __init__(self, config: Mapping[str, Any], device: torch.device):
        params = config["model"]["params"]
        self.device, self.dtype, self.batches = device, autocast_dtype(config), accumulated(config)
        self.prior, self.prior_weight = has_prior(config), params.get("reg_weight", 1.0)
        networks = diffusers_networks(config)
        self.embedder, self.scheduler = networks.embedder, networks.noise_schedule()
        self.unet = networks.unet.to(device).train()
        self.vae = networks.vae.to(device, self.dtype).eval().requires_grad_(False)
        self.text_encoder = networks.text_encoder.to(device).train()
        self.trained = [*self.unet.parameters()]
        if params.get("cond_stage_trainable", False):
            self.trained += self.text_encoder.parameters()
        else:
            self.text_encoder.requires_grad_(False)
        if params["unet_config"]["params"].get("use_checkpoint") in (True, "attention"):
            self.unet.enable_gradient_checkpointing()
            recompute_activations(self.text_encoder)
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-6, weight_decay=1e-2)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype is torch.float16)
        batch = Noise(config)
        self.images, self.tokens = batch.images, self.embedder.tokenize(batch.captions)

    def latents(self, images: Images) -> Tensor:
        """Sample the images' posteriors and scale the samples."""
        with torch.no_grad():
            posterior = self.vae.encode(images.to(self.vae.dtype)).latent_dist
        return posterior.sample() * self.vae.config.scaling_factor

    def loss(
        self, latents: Tensor, tokens: Int[Tensor, "b n"], noise: Tensor, t: Int[Tensor, " b"]
    ) -> Tensor:
        """Compute the subject's loss + weight x the prior, from one pass over both."""
        noisy = self.scheduler.add_noise(latents, noise, t)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            context = self.text_encoder(tokens)[0]
            output = self.unet(noisy, t, encoder_hidden_states=context).sample
        target = noise
        if self.scheduler.config.prediction_type == "v_prediction":
            target = self.scheduler.get_velocity(latents, noise, t)
        if not self.prior:
            return F.mse_loss(output.float(), target.float())
        (output, output_prior), (target, target_prior) = output.chunk(2), target.chunk(2)
        instance = F.mse_loss(output.float(), target.float())
        return instance + self.prior_weight * F.mse_loss(output_prior.float(), target_prior.float())

    def step(self) -> None:
        """Take one optimizer step."""
        for _ in range(self.batches):
            latents = self.latents(self.images.to(self.device))
            t = torch.randint(
                self.scheduler.config.num_train_timesteps, (len(latents),), device=self.device
            )
            loss = self.loss(latents, self.tokens.to(self.device), torch.randn_like(latents), t)
            self.scaler.scale(loss / self.batches).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)


class TwoForward:
    """The plain step on our own modules: a pass of every network for the subject and another for
    its prior.

    As the CompVis-style reference takes it: float32, every image encoded in every step, AdamW as
    PyTorch has it.
    """

    def __init__(self, config: Mapping[str, Any], device: torch.device):
        self.model = instantiate_from_config(target_of(config), "model").to(device).train()
        self.batches = accumulated(config)
        batch = Noise(config)
        count = batch.batch_size
        self.parts = list(
            zip(batch.images.split(count), (batch.captions[:count], batch.captions[count:]))
        )
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=config["model"]["base_learning_rate"])

    def part_loss(self, images: Images, captions: list[str]) -> Tensor:
        """Compute the mean loss of the subject's images, or of the class images."""
        model = self.model
        latents = model.get_first_stage_encoding(model.encode_first_stage(images.to(model.device)))
        t = torch.randint(len(model.betas), (len(latents),), device=model.device)
        return model.p_losses(latents, model.get_learned_conditioning(captions), t)[0]

    def loss(self) -> Tensor:
        """Compute the subject's loss + weight x the prior, one pass for each."""
        return self.model.objective.combine([self.part_loss(*part) for part in self.parts])

    def step(self) -> None:
        """Take one optimizer step."""
        for _ in range(self.batches):
            (self.loss() / self.batches).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


REFERENCES: dict[str, Callable[[Mapping[str, Any], torch.device], Reference]] = {
    "diffusers": DiffusersDreamBooth,
    "two-forward": TwoForward,
}
