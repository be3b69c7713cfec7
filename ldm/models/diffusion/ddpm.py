"""Latent diffusion: the wiring of UNet, autoencoder, text encoder, schedule and objective."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, cast

from jaxtyping import Float
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer

from ldm.errors import check_counts, check_positive, check_share
from ldm.models.diffusion.conditioning import Beside, Cond, DiffusionWrapper, with_beside
from ldm.models.diffusion.inpainting import RandomMasks, training_channels
from ldm.models.diffusion.interface import Images
from ldm.models.diffusion.logged_steps import LoggedSteps
from ldm.models.diffusion.new_words import check_words_alone, learns_words_alone, new_words
from ldm.models.diffusion.objective import Objective
from ldm.models.diffusion.preservation import PreservationOptions
from ldm.models.diffusion.schedule import Latent, NoiseSchedule, Steps
from ldm.models.diffusion.teacher import STATE as TEACHER
from ldm.models.diffusion.teacher import Teacher
from ldm.models.diffusion.thresholding import threshold_of
from ldm.models.diffusion.trained import (
    TextEncoderTraining,
    adapt,
    check_same_parameters,
    check_strategy,
    clips_scaled,
    freeze_parameters,
    group_names,
    layers_to_adapt,
    names_to_freeze,
    parts_to_train,
    stop_training,
)
from ldm.modules.adapters import check_adaptable, lora_options
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.ema import LitEma
from ldm.modules.embedding_manager import EmbeddingManager
from ldm.modules.encoders.modules import embed_distinct
from ldm.modules.losses.batch import Batch, RawBatch
from ldm.optim.boundary import at_step_boundary
from ldm.optim.registry import Part, make_optimizer
from ldm.optim.schedules import with_schedule
from ldm.util import instantiate_from_config, moved

log = logging.getLogger(__name__)


def __getattr__(name: str) -> Any:
    return moved(__name__, name)


class LatentDiffusion(LoggedSteps):
    """A text-to-image diffusion model in an autoencoder's latents (Rombach et al., 2112.10752).

    Args:
        unet_config, first_stage_config, cond_stage_config: `target` and `params` of the networks.
        timesteps, beta_schedule, linear_start, linear_end, cosine_s: see `NoiseSchedule.create`.
        zero_terminal_snr: rescale the schedule, a base model's too, so that its last step is noise
            alone (2305.08891); for parameterization v.
        parameterization, loss_type, reg_weight, original_elbo_weight, min_snr_gamma,
            caption_dropout, offset_noise, unmasked_weight, noisy_step_weight: see `Objective`.
        preservation: a method's name, or `method` and `teacher`, see `PreservationOptions`.
        scale_factor: multiplies latents, so that they have about unit variance.
        cond_stage_trainable: train the text encoder together with the UNet.
        text_encoder_lr, text_encoder_stop: see `TextEncoderTraining`.
        freeze: patterns (`*`, `?`, `[...]`) of names of trained parameters that are not to be; with
            `lora`, of the weights whose adapters are not.
        lora: `rank` and `alpha` of adapters on the UNet's attention and, with
            `cond_stage_trainable`, the text encoder's, which are trained instead of the weights.
        personalization_config: an `EmbeddingManager` with new words, which alone are trained unless
            its `pivotal` is true: Textual Inversion.
        conditioning_key: crossattn, concat or hybrid, which inpaints.
        mask_everything: see `RandomMasks`; of a training that inpaints.
        thresholding: what sampling does to each predicted image of a model in pixels: static,
            dynamic, dynamic:0.99 or none, see `threshold_of`.
        image_size: side of the latents that it is made for.
        use_ema, ema_decay: keep an exponential moving average of the UNet's weights.
        first_stage_key, cond_stage_key: a batch's entries for the image and the caption.
        monitor: the metric that names the best checkpoint.
        optimizer: a name in `ldm.optim.registry.OPTIMIZERS`.
        scheduler_config: a function from step to a factor for the learning rate, see
            `ldm.optim.schedules`.

    The learning rate is the attribute `learning_rate`, which the training command sets.
    """

    learning_rate: float = 1e-6
    # The whole config, where a checkpoint was opened with it; the sampling commands set it.
    built_from: Mapping[str, Any] | None = None

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
        noisy_step_weight: float = 1.0,
        preservation: str | Mapping[str, Any] = "class_images",
        ema_decay: float = 0.9999,
        optimizer: str = "adamw",
        scheduler_config: Mapping[str, Any] | None = None,
        lora: Mapping[str, Any] | None = None,
        personalization_config: Mapping[str, Any] | None = None,
        image_size: int = 64,
        mask_everything: float = 0.25,
        thresholding: str | None = None,
    ):
        super().__init__()
        # Check the values first: to build the networks takes much longer.
        self.objective = Objective(
            parameterization=parameterization,
            loss_type=loss_type,
            reg_weight=reg_weight,
            original_elbo_weight=original_elbo_weight,
            min_snr_gamma=min_snr_gamma,
            caption_dropout=caption_dropout,
            offset_noise=offset_noise,
            unmasked_weight=unmasked_weight,
            noisy_step_weight=noisy_step_weight,
        )
        self.preservation = PreservationOptions.of(preservation)
        self.preservation.check(reg_weight, lora is not None, conditioning_key)
        self.teacher: Teacher | None = None
        self.objective.check_terminal(zero_terminal_snr)
        self.random_masks = RandomMasks(mask_everything)
        self.threshold = threshold_of(thresholding)
        check_share("ema_decay", ema_decay)
        check_counts(image_size=image_size)
        check_positive("scale_factor", scale_factor)
        self.zero_terminal_snr = zero_terminal_snr
        self.text_training = TextEncoderTraining(text_encoder_lr, text_encoder_stop)
        self.words_alone = learns_words_alone(personalization_config)
        if self.words_alone:
            averages = {"use_ema": use_ema, "freeze": freeze, "lora": lora}
            taught = {"preservation": self.preservation.chosen.needs_teacher}
            check_words_alone(averages | taught)
            # LDM's configs say true, so that gradients reach the words.
            cond_stage_trainable = False
        self.text_training.check(cond_stage_trainable)
        self.cond_stage_trainable = cond_stage_trainable
        self._text_encoder_stopped = False
        self.freeze_patterns = freeze or ()
        self.lora = None if lora is None else lora_options(lora)
        self._adapted = False
        self.optimizer, self.scheduler_config = optimizer, scheduler_config
        self.first_stage_key, self.cond_stage_key = first_stage_key, cond_stage_key
        self.scale_factor, self.image_size, self.monitor = scale_factor, image_size, monitor

        # The schedule's tensors become buffers: CompVis checkpoints hold them under the same names.
        schedule = NoiseSchedule.create(
            timesteps, beta_schedule, linear_start, linear_end, cosine_s, zero_terminal_snr
        )
        self.register_schedule(schedule)

        # The three networks of latent diffusion (Rombach et al., figure 3).
        self.model = DiffusionWrapper(unet_config, conditioning_key)
        self.first_stage_model = instantiate_from_config(first_stage_config, "first_stage_config")
        self.cond_stage_model = instantiate_from_config(cond_stage_config, "cond_stage_config")
        # The autoencoder is never trained: the latents would change their meaning under the UNet.
        self.first_stage_model.requires_grad_(False)
        self.cond_stage_model.requires_grad_(cond_stage_trainable)
        # New words are learned through networks that stay as they are (Gal et al., eq. 2).
        self.embedding_manager: EmbeddingManager | None = None
        if personalization_config is not None:
            self.embedding_manager = new_words(personalization_config, self.cond_stage_model)
            self.model.requires_grad_(not self.words_alone)
        # Refuse patterns of `freeze` that fit nothing. With adapters, `configure_model` freezes
        # later.
        if self.lora:
            check_adaptable(self.cond_stage_model if cond_stage_trainable else None, use_ema)
        adapted = layers_to_adapt(cond_stage_trainable) if self.lora else None
        self._frozen = names_to_freeze(self, self.freeze_patterns, adapted)
        if not self.lora:
            freeze_parameters(self, self._frozen)
        # The EMA is one of the trained parameters alone, so it comes after the freezing.
        self.model_ema = LitEma(self.model, ema_decay) if use_ema else None
        self.train(self.training)

    # Modules and their state

    @property
    def text_trains(self) -> bool:
        """Return whether the text encoder trains and has not reached `text_encoder_stop`."""
        return self.cond_stage_trainable and not self._text_encoder_stopped

    @property
    def text_has_gradients(self) -> bool:
        """Return whether gradients reach the text encoder, for itself or for new words."""
        return self.text_trains or self.words_alone

    def train(self, mode: bool = True) -> LatentDiffusion:
        """Set the mode of what is trained; frozen networks stay in evaluation mode."""
        super().train(mode)
        # Lightning sets the mode of all; dropout in a frozen network would only disturb the others.
        self.first_stage_model.eval()
        self.cond_stage_model.train(mode and self.text_trains)
        self.model.train(mode and not self.words_alone)
        return self

    # The training step

    def _losses(
        self,
        x_start: Latent,
        cond: Cond,
        t: Steps,
        noise: Latent,
        weights: Float[Tensor, "b h w"] | None = None,
        taught: Sequence[str] = (),
    ) -> dict[str, Tensor]:
        """Return each sample's losses, (b,), see `Objective.losses`.

        Args:
            taught: captions of the last samples, which are compared with the teacher's predictions.
        """
        # Go to time step t at once (DDPM, eq. 4), then let the UNet predict with the help of the
        # text (Rombach et al., eq. 3).
        schedule = self.schedule
        x_noisy, kept = schedule.q_sample(x_start, t, noise), None
        if taught:
            assert self.teacher is not None
            kept = self.teacher.predict(self, taught, x_noisy[-len(taught) :], t[-len(taught) :])
        output, vlb = self.apply_model(x_noisy, t, cond), self.lvlb_weights
        return self.objective.losses(schedule, vlb, output, x_start, t, noise, weights, kept)

    def shared_step(self, batch: RawBatch, prefix: str) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a subject, or of a (subject, prior) pair, and what to log of it."""
        # The subject's examples and, with prior preservation, those of its class, which keep the
        # model from forgetting what else the class word means (Ruiz et al., eq. 2).
        trains = prefix == "train"
        examples = self.batch_of(batch)
        if trains:
            examples = self.preservation.chosen.with_prior(examples)

        # Every network runs once, over subject and prior together: faster than twice.
        posterior = self._posterior(examples)

        # Draw time steps and noise (DDPM, algorithm 1). They depend on the examples' seeds alone,
        # so that a resumed run repeats them.
        steps, shape = self.num_timesteps, posterior.mean.shape[1:]
        draws = self.objective.draws(examples, shape, steps, self.device)

        # The posterior is sampled anew in every step, also where the latents are cached: a cache
        # holds its mean and variance, not a sample.
        x_start = self.get_first_stage_encoding(posterior, draws.eps)
        weights = self.objective.place_weights(examples, draws.eps)

        # Empty captions teach the unconditional model that guidance needs (Ho & Salimans, algorithm
        # 1). Validation keeps all captions, so that its losses compare.
        captions = self.objective.captions(examples) if trains else examples.captions
        text = embed_distinct(self.get_learned_conditioning, captions)
        # One that inpaints or upscales also reads another image.
        cond = with_beside(text, self.beside(examples))

        # The error of each example, then the subject's mean and the prior's, weighted. A teacher
        # says what the prior's predictions are to be.
        taught = captions[len(examples.subject) :] if self.teacher and trains else []
        losses = self._losses(x_start, cond, draws.t, draws.noise, weights, taught)
        factors = self.objective.step_weights(examples, draws.t, steps) if trains else None
        if factors is not None:
            losses["loss"] = factors * losses["loss"]
        loss, logged = self.objective.total(examples, losses)
        return loss, {f"{prefix}/{name}": value for name, value in logged.items()}

    def beside(self, batch: Batch) -> Beside | None:
        """Return what the UNet reads of a batch beside the noisy latent; None for text alone."""
        return training_channels(self, self.random_masks, batch)

    def show_beside(self, beside: Beside) -> dict[str, Images]:
        """Return the masked images that an inpainting model reads."""
        # Behind the mask's channel come those of the masked image's latent.
        return {"masked": self.decode_first_stage(beside["c_concat"][:, 1:])}

    # Lightning

    def configure_model(self) -> None:
        """Give the UNet its memory format and, once, the model the adapters that `lora` asks for.

        Not in `__init__`: initial weights come without adapters, in their own format. Lightning
        calls this before it restores a checkpoint, which has them.
        """
        unet = self.model.diffusion_model
        if isinstance(unet, UNetModel):
            unet.use_memory_format()
        if self.lora is not None and not self._adapted:
            adapt(self, layers_to_adapt(self.cond_stage_trainable), self.lora, self._frozen)
            self._adapted = True
        # The teacher is the model as it is now, before the first step.
        if self.preservation.chosen.needs_teacher and self.teacher is None:
            self.teacher = self.preservation.teacher_of(self)

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Raise a `UserError` if a run goes on with other parameters than its checkpoint trains."""
        # An optimizer's state goes by position. For another set of parameters it would fit by
        # accident or not at all.
        count = sum(parameter.requires_grad for parameter in self.parameters())
        names = group_names(self._parts())
        check_same_parameters(checkpoint, names, count, self.freeze_patterns)
        if self.teacher is not None:
            self.teacher.load(checkpoint.get(TEACHER, {}))

    def on_save_checkpoint(self, checkpoint: dict[str, object]) -> None:
        """Put a copied teacher's weights in: a run that goes on could not make it again."""
        if self.teacher is not None:
            checkpoint[TEACHER] = self.teacher.state()

    def on_fit_start(self) -> None:
        if self.text_training.stop is not None:
            check_strategy(self.trainer.strategy)

    def on_train_batch_start(self, batch: RawBatch, batch_idx: int) -> None:
        # The text encoder's training may end before the UNet's. A run that is resumed behind that
        # step has to stop it as well, so the step is compared with `>=`.
        stop = self.text_training.stop
        if self.text_trains and stop is not None and self.global_step >= stop:
            self._text_encoder_stopped = True
            stop_training(self.cond_stage_model)
            log.info("step %d: the text encoder stays as it is from here on", self.global_step)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        # Here and not at the batch's end: a checkpoint written there holds this step's EMA weights.
        if self.model_ema:
            self.model_ema(self.model)

    def on_train_batch_end(self, outputs: object, batch: RawBatch, batch_idx: int) -> None:
        # Lightning would keep a step's gradients beside the next forward pass's activations.
        if at_step_boundary(self.trainer, batch_idx):
            cast(Optimizer, self.optimizers()).zero_grad()

    def _parts(self) -> Sequence[Part]:
        if self.embedding_manager is not None and self.words_alone:
            return [self.embedding_manager]
        text_encoder = self.cond_stage_model if self.cond_stage_trainable else None
        return parts_to_train(self.model, text_encoder, self.text_training.lr)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make one optimizer over the UNet and, if it is trained, the text encoder."""
        trainer = self._trainer
        # Fused Adam unscales fp16's gradients itself, which must not happen twice.
        is_adam = self.optimizer in ("adam", "adamw")
        options = {"fused": False} if is_adam and clips_scaled(trainer) else {}
        optimizer = make_optimizer(self.optimizer, self._parts(), self.learning_rate, **options)
        # A schedule that decays has to know where the run ends.
        max_steps = -1 if trainer is None else trainer.max_steps
        return with_schedule(optimizer, self.scheduler_config, max_steps)


LatentInpaintDiffusion = LatentDiffusion  # LDM's name for one whose conditioning_key is hybrid
