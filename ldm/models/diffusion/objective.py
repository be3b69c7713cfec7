"""What a training minimises: the UNet's weighted error, of the subject and of its prior."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ldm.errors import ParameterError, check_share
from ldm.models.diffusion.parameterization import PARAMETERIZATIONS, Parameterization
from ldm.models.diffusion.schedule import Latent, NoiseSchedule, Steps
from ldm.modules.losses.batch import Batch, Examples
from ldm.modules.losses.per_sample import per_sample_loss, pixel_loss, place_weights, with_offset
from ldm.rng import SampleRandom, derive_seed


@dataclass(frozen=True)
class Draws:
    """A step's random numbers for each example: the posterior's, the time step, and the noise."""

    eps: Latent
    t: Steps
    noise: Latent

    @classmethod
    def joined(cls, parts: Sequence[Draws]) -> Draws:
        """Return the draws of several parts as one."""
        eps = torch.cat([part.eps for part in parts])
        t = torch.cat([part.t for part in parts])
        return cls(eps, t, torch.cat([part.noise for part in parts]))


@dataclass(frozen=True)
class Objective:
    """A loss and all that it depends on but the networks and the noise schedule.

    Args:
        parameterization: what the UNet predicts: eps, x0 or v.
        loss_type: l2 or l1.
        reg_weight: weight of the prior's loss beside the subject's.
        original_elbo_weight: weight of the variational bound, beside 1 for the simple loss.
        min_snr_gamma: weight each time step as min-SNR does (2303.09556); None weights all alike.
        caption_dropout: share of captions that training empties (2207.12598).
        offset_noise: strength of a random constant for each sample and channel in the noise.
        unmasked_weight: weight of what a mask leaves black; white has 1.
        noisy_step_weight: weight of the subject's loss at the last time step, which is noise
            almost alone; it falls from 1 at the first. T-LoRA (2507.05964) finds that a subject is
            overfitted at noisy steps most of all. The prior counts at all steps.

    Raises:
        UserError: a name that is not known, or a number out of range.
    """

    parameterization: str = "eps"
    loss_type: str = "l2"
    reg_weight: float = 1.0
    original_elbo_weight: float = 0.0
    min_snr_gamma: float | None = None
    caption_dropout: float = 0.0
    offset_noise: float = 0.0
    unmasked_weight: float = 0.0
    noisy_step_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.parameterization not in PARAMETERIZATIONS:
            accepted = ", ".join(PARAMETERIZATIONS)
            problem = f"unknown '{self.parameterization}'; accepted: {accepted}"
            raise ParameterError("parameterization", problem)
        # Raises for a name that it does not know.
        pixel_loss(self.loss_type)
        for name in ("reg_weight", "original_elbo_weight", "offset_noise"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ParameterError(name, f"expected 0 or more, got {value}")
        for name in ("caption_dropout", "unmasked_weight", "noisy_step_weight"):
            check_share(name, getattr(self, name))
        if self.min_snr_gamma is not None and not self.min_snr_gamma > 0:
            problem = f"expected a positive number, got {self.min_snr_gamma}"
            raise ParameterError("min_snr_gamma", problem)

    def check_terminal(self, zero_terminal_snr: bool) -> None:
        """Raise a `UserError` if a step is noise alone, from which this network cannot learn."""
        if zero_terminal_snr and self.parameterization != "v":
            raise ParameterError(
                "zero_terminal_snr",
                f"needs parameterization: v, got {self.parameterization}: of noise alone, "
                "its noise is known and says nothing about the image",
            )

    @property
    def prediction(self) -> Parameterization:
        """Return what the UNet's output stands for."""
        return PARAMETERIZATIONS[self.parameterization]

    # Before the networks run

    def draws(
        self, batch: Batch, latent_shape: Sequence[int], steps: int, device: torch.device
    ) -> Draws:
        """Draw what is random in a step for all parts of a batch, see `draw`."""
        # If the prior's examples are the subject's images once more, they also get the same noise.
        count = 1 if batch.repeats_subject else len(batch.parts)
        drawn = [self.draw(part, latent_shape, steps, device) for part in batch.parts[:count]]
        return Draws.joined(drawn * (len(batch.parts) // count))

    def draw(
        self, examples: Examples, latent_shape: Sequence[int], steps: int, device: torch.device
    ) -> Draws:
        """Draw what is random in a step, as a function of the examples' seeds.

        Args:
            latent_shape: of one example, without the batch.
            steps: of the noise schedule.
        """
        # With seeds, each example has a random stream of its own: its noise depends neither on the
        # batch nor on the number of devices.
        count = len(examples)
        random = SampleRandom(examples.seeds, device)
        # The order of the draws is the reference's: without seeds, torch's global generator gives
        # the same numbers there and here. Time steps are uniform (DDPM, algorithm 1).
        eps = random.randn((count, *latent_shape))
        t = random.randint(steps, count)
        noise = random.randn((count, *latent_shape))
        # Offset noise shifts a whole channel at random. The model learns from it to change an
        # image's mean brightness, which plain noise hardly touches.
        return Draws(eps, t, with_offset(noise, self.offset_noise, examples.seeds))

    def captions(self, batch: Batch) -> list[str]:
        """Return a training batch's captions, of which `caption_dropout` leaves a share empty."""
        # With a prior, only its captions are dropped: guidance away from an unconditional model
        # that has learned the subject would drive the class away from it.
        *whole, last = batch.parts
        captions = [caption for part in whole for caption in part.captions]
        return captions + self._dropped(last)

    def _dropped(self, examples: Examples) -> list[str]:
        """Return the captions of one part, some left empty: which ones depends on their seeds."""
        if self.caption_dropout == 0:
            return list(examples.captions)
        seeds = None
        if examples.seeds is not None:
            # Seeds of their own: with and without dropout, all other draws are the same.
            seeds = [derive_seed("caption", int(seed)) for seed in examples.seeds]
        dropped = SampleRandom(seeds).rand(len(examples)) < self.caption_dropout
        return ["" if drop else caption for drop, caption in zip(dropped, examples.captions)]

    def place_weights(self, batch: Batch, latents: Latent) -> Float[Tensor, "b h w"] | None:
        """Return how much each place of the latents counts; None if the batch has no masks."""
        # A mask lowers the weight of what surrounds the subject, so that the background is not
        # learned along with it.
        masks = [part.masks for part in batch.parts]
        return place_weights(masks, batch.split(latents), self.unmasked_weight)

    def step_weights(self, batch: Batch, t: Steps, steps: int) -> Float[Tensor, " b"] | None:
        """Return how much each example's time step counts; None if all count alike.

        Args:
            steps: of the noise schedule.
        """
        if self.noisy_step_weight == 1:
            return None
        weights = 1 - (1 - self.noisy_step_weight) * t / (steps - 1)
        subject, *prior = batch.split(weights)
        return torch.cat([subject, *(torch.ones_like(part) for part in prior)])

    # After they ran

    def losses(
        self,
        schedule: NoiseSchedule,
        vlb_weights: Float[Tensor, " T"],
        output: Latent,
        x_start: Latent,
        t: Steps,
        noise: Latent,
        weights: Float[Tensor, "b h w"] | None = None,
        kept: Float[Tensor, "k c h w"] | None = None,
    ) -> dict[str, Float[Tensor, " b"]]:
        """Return each sample's simple loss, term of the variational bound, and their weighted sum.

        Args:
            vlb_weights: of each time step, from `Parameterization.vlb_weights`.
            weights: of places; with them, all losses are of weighted means.
            kept: a teacher's predictions, which the last of the outputs are to equal.
        """
        # The simple loss (DDPM, eq. 14), of whatever the UNet predicts. It stays one number for
        # each sample, because the weights below depend on the sample's time step.
        target = self.prediction.target(schedule, x_start, t, noise)
        if kept is not None:
            target = torch.cat([target[: len(target) - len(kept)], kept.to(target)])
        simple = per_sample_loss(output, target, self.loss_type, weights)
        # Its term of the variational bound (DDPM, eq. 12) is always logged, and seldom minimised.
        vlb = vlb_weights[t] * simple
        weighted = simple
        if self.min_snr_gamma is not None:
            # A loss on noise or v weights the error of x_0 by SNR or SNR + 1, which is very large
            # where little noise is left. Min-SNR bounds that weight (Hang et al., 2303.09556).
            weighted = simple * self.prediction.min_snr_weight(schedule, t, self.min_snr_gamma)
        return {
            "loss_simple": simple,
            "loss_vlb": vlb,
            "loss": weighted + self.original_elbo_weight * vlb,
        }

    def combine(self, losses: Sequence[Float[Tensor, ""]]) -> Float[Tensor, ""]:
        """Return subject + reg_weight * prior (DreamBooth, eq. 2), or the subject's alone."""
        # The prior's term keeps what the model knows of the class while it learns the subject.
        subject, *prior = losses
        return subject + self.reg_weight * prior[0] if prior else subject

    def total(
        self, batch: Batch, losses: Mapping[str, Float[Tensor, " b"]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss to minimise, and what to log of the subject, the prior and both."""
        # Subject and prior have separate means: their numbers of examples do not shift the balance,
        # which is `reg_weight` alone.
        means = {
            name: [part.mean() for part in batch.split(value)] for name, value in losses.items()
        }
        loss = self.combine(means["loss"])
        # `loss` is the subject's, as in a run without a prior, so that curves of both compare.
        logged = {name: parts[0] for name, parts in means.items()}
        if batch.prior is not None:
            logged["loss_prior"] = means["loss"][1]
        logged["loss_total"] = loss
        return loss, {name: value.detach() for name, value in logged.items()}

    def metric_names(self, has_prior: bool) -> list[str]:
        """Return the names of what `total` logs."""
        prior = ["loss_prior"] if has_prior else []
        return ["loss_simple", "loss_vlb", "loss", *prior, "loss_total"]
