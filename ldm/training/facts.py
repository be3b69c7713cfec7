"""What the engine's choices depend on: the facts of a run, or of a config alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytorch_lightning as pl
import torch

from ldm.callbacks.setup import callbacks_of
from ldm.checkpoints.export import target_of
from ldm.config import RunConfig
from ldm.data.concepts import Concept
from ldm.data.datamodule import DataModuleFromConfig
from ldm.data.latents import HasVariants
from ldm.data.streams import count_images
from ldm.distributed import is_sharded
from ldm.models.autoencoder import IdentityFirstStage
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.inpainting import inpaints
from ldm.models.diffusion.super_resolution import upscales
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.training import engine, memory
from ldm.training.build_trainer import needs_gradients
from ldm.training.engine import LATENTS, LAYOUT, OPTIMIZER, RECOMPUTE, Choice, Facts, Images
from ldm.training.memory import Estimate
from ldm.util import instantiate_from_config

CHOSEN = "run.chosen"  # where a run's saved config lists the keys that the engine has chosen
KEYS = (LATENTS, OPTIMIZER, RECOMPUTE, LAYOUT)


def decide(
    config: RunConfig,
    trainer: pl.Trainer,
    model: pl.LightningModule,
    data: pl.LightningDataModule,
    resumes: bool,
) -> tuple[RunConfig, str]:
    """Set what the engine chooses for a run on its model and data, which are built but not used.

    Returns:
        the config with what was chosen, under `run.chosen` also which keys that are; and a line for
        the start summary. For other models and data, the config as it is and an empty line.
    """
    if not isinstance(model, LatentDiffusion) or not isinstance(data, DataModuleFromConfig):
        return config, ""
    if not isinstance(model.model.diffusion_model, UNetModel):
        return config, ""
    choices = engine.choose(facts_of_run(config, trainer, model, data, resumes))
    _apply(choices, model, data)
    chosen = {choice.key: choice.value for choice in choices if choice.chosen}
    if chosen or config.get(CHOSEN):
        config = config.having({**chosen, CHOSEN: sorted(chosen)})
    return config, engine.in_one_line(choices)


def _apply(choices: list[Choice], model: LatentDiffusion, data: DataModuleFromConfig) -> None:
    """Give model and data what was chosen for them."""
    values = {choice.key: choice.value for choice in choices if choice.chosen}
    unet = model.model.diffusion_model
    if LATENTS in values:
        data.latent_cache = values[LATENTS]
    if OPTIMIZER in values:
        model.optimizer = values[OPTIMIZER]
    if RECOMPUTE in values:
        unet.recompute(values[RECOMPUTE])
    if LAYOUT in values:
        unet.channels_last = values[LAYOUT]  # `configure_model` gives the weights this layout


def facts_of_run(
    config: RunConfig,
    trainer: pl.Trainer,
    model: LatentDiffusion,
    data: DataModuleFromConfig,
    resumes: bool = False,
) -> Facts:
    """Collect the facts of a run that is about to start."""
    device = trainer.strategy.root_device
    weights = sum(p.nbytes for p in [*model.parameters(), *model.buffers()])
    return Facts(
        device=device.type,
        weights=weights,
        trained=trained_bytes(model),
        given={key: config.get(key) for key in KEYS},
        memory=_memory(trainer, model, device),
        needed=Needs(
            lambda: twin_of(config.content), lambda twin: memory.of_run(trainer, twin, data)
        ),
        images=_images(trainer, model, data),
        needs_gradients=[*needs_gradients(trainer), *_watchers(trainer)],
        sharded=is_sharded(trainer),
        settled={key: config.get(key) for key in config.get(CHOSEN, [])},
        resumes=resumes,
    )


GRADIENT_HOOKS = ("on_after_backward", "on_before_optimizer_step", "on_before_zero_grad")


def _watchers(trainer: pl.Trainer) -> list[str]:
    """Return the names of others' callbacks that may read gradients, or change how many add up."""

    def reads(kind: type) -> bool:
        return any(getattr(kind, hook) is not getattr(pl.Callback, hook) for hook in GRADIENT_HOOKS)

    kinds = {type(callback) for callback in callbacks_of(trainer)}
    others = [kind for kind in kinds if not kind.__module__.startswith("ldm.")]
    accumulates = pl.callbacks.GradientAccumulationScheduler
    found = [kind for kind in others if reads(kind) or issubclass(kind, accumulates)]
    more = ["sharded weights"] if is_sharded(trainer) else []
    return sorted(kind.__name__ for kind in found) + more


def twin_of(content: Mapping[str, object]) -> Any:
    """Build a config's model without memory for its weights, as it will train."""
    with torch.device("meta"):
        twin: Any = instantiate_from_config(target_of(content), "model")
    twin.configure_model()
    return twin


class Needs:
    """What a step needs, by what is recomputed and the optimizer.

    The model is built when that is asked first, and each case is estimated once: it takes seconds.

    Args:
        build: makes the model without memory for its weights.
        estimate: of the model as it is now; None where memory is of no concern.
    """

    def __init__(
        self,
        build: Callable[[], LatentDiffusion],
        estimate: Callable[[LatentDiffusion], Estimate | None],
    ):
        self._build, self._estimate = build, estimate
        self._twin: LatentDiffusion | None = None
        self._found: dict[tuple[bool | str, str], Estimate | None] = {}

    def __call__(self, recomputed: bool | str, optimizer: str) -> int:
        found = self.estimate(recomputed, optimizer)
        return 0 if found is None else found.total

    def estimate(self, recomputed: bool | str, optimizer: str) -> Estimate | None:
        """Return the whole estimate."""
        case = (recomputed, optimizer)
        if case not in self._found:
            if self._twin is None:
                self._twin = self._build()
            self._twin.model.diffusion_model.recompute(recomputed)
            self._twin.optimizer = optimizer
            self._found[case] = self._estimate(self._twin)
        return self._found[case]


def trained_bytes(model: LatentDiffusion) -> int:
    """Count the bytes of the trained weights; adapters, which come later, are few."""
    if model.lora:
        return 0
    return sum(p.nbytes for p in model.parameters() if p.requires_grad)


def _memory(trainer: pl.Trainer, model: LatentDiffusion, device: torch.device) -> int | None:
    """Return the bytes of the device that a training may take, what it has already included."""
    free = memory.available_bytes(device)
    if free is None:
        return None
    # The processes of one machine share its memory, but have a GPU each.
    sharing = trainer.num_devices if device.type == "cpu" else 1
    return free // sharing + memory.held_bytes(model, device)


def _images(
    trainer: pl.Trainer, model: LatentDiffusion, data: DataModuleFromConfig
) -> Images | str:
    """Count what a cache of latents would hold, or say why there can be none."""
    side = getattr(data.datasets.get("train"), "size", None)
    reasons = [why_no_latents(model), *map(_why_not_cacheable, data.concepts)]
    if any(reasons) or not side:
        return next((reason for reason in reasons if reason), "images of any size")
    variants = sum(_to_encode(concept) for concept in data.concepts)
    numbers = 2 * model.first_stage_model.embed_dim * (side // model.downsampling) ** 2
    free = memory.available_bytes(torch.device("cpu"))
    return Images(variants, _draws(trainer, data), 4 * numbers * variants, free)


def why_no_latents(model: LatentDiffusion) -> str:
    """Say why a model has to see the images themselves in each step; an empty text if it has not
    to.
    """
    if inpaints(model):
        return "an inpainting model encodes each image anew under its mask"
    if upscales(model):
        return "a super-resolution model reads each image made smaller"
    if isinstance(model.first_stage_model, IdentityFirstStage):
        return "a model in pixels has no latents"
    return ""


def _why_not_cacheable(concept: Concept) -> str:
    for name in ("train", "reg"):
        dataset, config = concept.datasets.get(name), concept.configs.get(name)
        if dataset is not None and not isinstance(dataset, HasVariants):
            return f"{name} is no folder of images"
        # Class images that are still to be made are not opened yet.
        params = (config or {}).get("params") or {}
        if getattr(dataset, "resize", params.get("resize")) == "random_crop":
            return f"{name} is cropped anew each time"
    return ""


def _to_encode(concept: Concept) -> int:
    """Count a subject's pictures and their mirrors, and those of its class."""
    train, prior = concept.datasets["train"], concept.prior
    found = _variants(train.flip_p) * count_images(train)
    if concept.reg is None:
        return found
    flips = getattr(prior, "flip_p", (concept.reg.get("params") or {}).get("flip_p", 0.5))
    there = 0 if prior is None else count_images(prior)
    return found + _variants(flips) * max(there, concept.num_class_images)


def _variants(flip_p: float) -> int:
    return 2 if 0 < flip_p < 1 else 1


def _draws(trainer: pl.Trainer, data: DataModuleFromConfig) -> int | None:
    """Count the pictures that one process reads in all steps; None without an end."""
    batches = trainer.accumulate_grad_batches * trainer.max_steps
    if trainer.max_steps < 0:
        if not trainer.max_epochs or trainer.max_epochs < 0:
            return None
        share = data.batch_size * trainer.world_size
        batches = trainer.max_epochs * max(1, len(data.datasets["train"]) // share)
    return batches * data.batch_size * (1 if data.reg is None else 2)
