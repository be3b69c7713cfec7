"""`train`: a checked config and a run become a trained model."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor

from ldm import signals
from ldm.callbacks.checkpoints import CheckpointKeeper
from ldm.callbacks.setup import ChecksRun, callbacks_of
from ldm.callbacks.timing import TimingCallback
from ldm.checkpoints.checkpoint import Checkpoint
from ldm.checkpoints.embeddings import NAME, write_words
from ldm.checkpoints.export import DTYPES, sha256
from ldm.checkpoints.finite import check_usable
from ldm.checkpoints.loading import compare
from ldm.checkpoints.lora import adapters_alone
from ldm.checkpoints.reading import read_checkpoint, state_dict_of
from ldm.commands import disk_text
from ldm.config import SECTIONS, RunConfig
from ldm.distributed import failure_of_others, first_alone, is_sharded
from ldm.errors import ParameterError, UserError, under
from ldm.host import is_out_of_memory
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.trained import check_strategy
from ldm.modules.encoders.t5 import words_of
from ldm.optim.registry import make_optimizer
from ldm.optim.schedules import with_schedule
from ldm.training import memory, summary
from ldm.training.build_trainer import (
    build_trainer,
    check_optimizer,
    quiet_lightning,
    tell_config,
)
from ldm.training.checks import (
    check_identifiers,
    check_monitors,
    check_new_words,
    check_preservation,
)
from ldm.training.class_word import class_word_line
from ldm.training.disk import check_disk
from ldm.training.facts import decide, why_no_latents
from ldm.training.initial_weights import Start, build_model
from ldm.training.prepare import check_images, prepare
from ldm.training.resume import Resumed, check_resume
from ldm.training.run import Run
from ldm.training.sharding import check_shardable, whole_state
from ldm.training.stages import Stages
from ldm.util import instantiate_from_config

if TYPE_CHECKING:
    from ldm.data.datamodule import DataModuleFromConfig

log = logging.getLogger(__name__)

Kept = TypeVar("Kept", bound=pl.Callback)


@dataclass(frozen=True)
class Trained:
    """What `train` made."""

    model: pl.LightningModule
    data: pl.LightningDataModule
    trainer: pl.Trainer
    run: Run


def train(config: RunConfig, run: Run, start: Start | None = None, test: bool = False) -> Trained:
    """Train as `config` says, into `run`'s folder.

    Args:
        config: checked by `ldm.config.check_config`.
        run: a new folder, or one with a checkpoint to go on from.
        start: the initial weights of a new run.
        test: run the config's test set afterwards, if it has one.

    Raises:
        UserError: what the user gave cannot be used. Whatever can be known before anything is
            written is refused then.
    """
    start, stages = start or Start(), Stages()
    quiet_lightning()
    # Compare a run that goes on with its own past. That reads no tensor, so it comes first.
    resumed = check_resume(config, run) if run.resume_from else None

    # Every random choice is a function of the seed and the position in the run.
    pl.seed_everything(config.seed, workers=True, verbose=False)

    # Check the images. To build the model takes minutes, so a broken image has to show before.
    seed = {} if config.get("data.params.seed") is not None else {"seed": config.seed}
    data = instantiate_from_config(config.data, "data", **seed)
    if not config.get("data.params.train"):
        raise UserError("data.params.train: needed to train")
    check_images(data)

    # Build the trainer and the model. The file of the weights is read once.
    config = _with_base_model(config, start)
    trainer = build_trainer(config, run)
    check_optimizer(config, trainer)
    model, report = build_model(config, start, resumes=run.resume_from is not None)

    # Switch on what makes this run faster, changes no number and works here. What the config says
    # stays as it is.
    config, engine = decide(config, trainer, model, data, run.resume_from is not None)
    tell_config(trainer, config)
    set_learning_rates(model, config, trainer, data.batch_size)

    # Refuse whatever can be refused now: class images may take hours.
    check_monitors(trainer, model, data, config)
    check_preservation(model, data)
    check_new_words(model, data)
    with under("model.params.cond_stage_config.params"):
        encode = words_of(getattr(model, "cond_stage_model", None))
    check_identifiers(config, data.summary(), encode)
    check_training(model, data, trainer)
    first = resumed.step if resumed else 0

    with signals.handled():
        first_alone(lambda: check_disk(trainer, model, _keeper(trainer), config.export, first))

        # Class images and cached latents, made by the model as it is now.
        stages.end("start")
        prepare(model, data, trainer, stages, run.resume_from)
        # Wait until the first process is here. Later waits are torch's: they would go on for half
        # an hour after the first process has ended.
        first_alone(lambda: None)

        # The steps. What ends them early says which step is saved and how to go on.
        callbacks_of(trainer).append(_Announcement(run, report, resumed, config, engine))
        if run.resume_from:  # not as an argument of fit, which hides it from the callbacks
            trainer.ckpt_path = str(run.resume_from)
            _check_goes_on(model, run.resume_from)
        _fit(trainer, model, data, run, first)
        stages.end("steps")

        # Write what is made of the trained weights beside the checkpoints, and say what to do with
        # them.
        try:
            _finish(trainer, model, data, config, run, stages)
            if test and "test" in data.datasets:
                trainer.test(model, datamodule=data)
        except signals.Interrupted as stop:
            stop.advice = summary.trained_already(_keeper(trainer), config)
            raise
    return Trained(model, data, trainer, run)


def check_training(
    model: pl.LightningModule, data: pl.LightningDataModule, trainer: pl.Trainer
) -> None:
    """Raise a `UserError` for what would end a training of this model on this data at its start."""
    # Sharding and the callbacks know best what they cannot work with. They are asked here, not in
    # their first step.
    if is_sharded(trainer):
        check_shardable(model)
    for callback in callbacks_of(trainer):
        if isinstance(callback, ChecksRun):
            callback.check(model, data)
    if isinstance(model, LatentDiffusion):
        why = why_no_latents(model) if getattr(data, "latent_cache", None) else ""
        if why:
            raise ParameterError("data.params.latent_cache", f"{why}; leave it out")
        # Make the optimizer and its schedule once, for a small layer that is thrown away, so that
        # wrong options show now.
        stand_in = torch.nn.Linear(1, 1)
        with under("model.params"):
            optimizer = make_optimizer(model.optimizer, [stand_in], model.learning_rate)
            with_schedule(optimizer, model.scheduler_config, trainer.max_steps)
            if model.text_training.stop is not None:
                check_strategy(trainer.strategy)


def _check_goes_on(model: pl.LightningModule, path: Path) -> None:
    """Raise a `UserError` if a checkpoint to go on from does not fit, or holds infinite values."""
    model.configure_model()  # a LoRA run's checkpoint has adapters, so the model needs them, too
    state = state_dict_of(read_checkpoint(path), path)
    report = compare(model, state, "the checkpoint to go on from")
    check_usable(model, state, report.used, path)


def _fit(
    trainer: pl.Trainer,
    model: pl.LightningModule,
    data: pl.LightningDataModule,
    run: Run,
    first: int,
) -> None:
    """Train from step `first` on; an error says which step is saved.

    If memory runs out, it also says what needs less.
    """
    # Autocast would keep a copy of each weight until the forward pass ends. Each is read once, so
    # the copies would only take memory.
    cache = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        trainer.fit(model, datamodule=data, weights_only=False)
    except BaseException as error:
        # Whatever ended the run, its user has to know what is saved.
        left = summary.left(_keeper(trainer), run, first, trainer.global_step)
        if isinstance(error, signals.Interrupted):
            error.advice = left
            raise
        # A start that was refused has nothing to go on from. Of several processes, the first says
        # what is saved.
        says = run.trained and trainer.is_global_zero
        text = _as_user_error(error, trainer, model)
        if text:
            raise UserError(f"{text}; {left}" if says else text) from error
        if says:
            log.error("%s", left)
        raise
    finally:
        torch.set_autocast_cache_enabled(cache)


def _as_user_error(error: BaseException, trainer: pl.Trainer, model: pl.LightningModule) -> str:
    """Return the one line that says what a user can do about an error, or nothing."""
    # The model's hooks name a parameter without its path in the config. Add the path there.
    if isinstance(error, ParameterError):
        located = error.parameter.partition(".")[0] in SECTIONS[""]
        return str(error if located else error.under("model.params"))
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, MisconfigurationException):
        return f"lightning.trainer: {' '.join(str(error).split())}"
    if isinstance(error, OSError) and disk_text(error):
        return disk_text(error)
    # Memory follows from the config, so the advice names the settings that need less.
    if is_out_of_memory(error) and isinstance(model, LatentDiffusion):
        step, device = trainer.global_step + 1, trainer.strategy.root_device
        return f"{device}: out of memory in step {step}. {memory.advice(trainer, model)}"
    # In a group, the first failure ends the other processes, too. Their own errors are not the
    # cause.
    said = failure_of_others() if isinstance(error, Exception) else ""
    return f"stopped, for another process ended: {said}" if said else ""


def _finish(
    trainer: pl.Trainer,
    model: pl.LightningModule,
    data: DataModuleFromConfig,
    config: RunConfig,
    run: Run,
    stages: Stages,
) -> None:
    """Write the adapters and the export that are asked for, and say what there is now."""
    # Every process takes part in gathering sharded weights; only the first one writes.
    state = whole_state(trainer) if config.export else None
    if not trainer.is_global_zero:
        return
    keeper, timing = _keeper(trainer), _only(trainer, TimingCallback)
    found, steps = data.summary(), trainer.global_step
    images = {key: found[key] for key in ("subject_images", "class_images")}
    try:
        _write_adapters(model, keeper, config, run, steps, images)
        embeddings = _write_new_words(model, keeper)
        exported = None if state is None else _export(state, config, run, steps, images)
    except UserError as error:
        # The training itself is done: its weights are not lost with the export.
        raise UserError(f"{error}; {summary.trained_already(keeper, config)}") from error
    prompts = found["subject_prompts"]
    prompt = prompts[0] if prompts else None
    log.info(summary.end(trainer, keeper, timing, prompt, exported, embeddings, run, stages))


def _write_adapters(
    model: pl.LightningModule,
    keeper: CheckpointKeeper | None,
    config: RunConfig,
    run: Run,
    steps: int,
    images: Mapping[str, int],
) -> None:
    """Write the adapters of a LoRA run alone, beside its last checkpoint."""
    lora = getattr(model, "lora", None)
    if not lora or keeper is None or not keeper.last_path.exists():
        return
    # This small file is what other programs load; the checkpoint is there to go on from.
    path, adapted = keeper.last_path.with_name(summary.LORA), model.state_dict()
    tuned = Checkpoint.of_run(path, adapted, config.content, steps, images)
    tuned.as_lora(adapters_alone(adapted, lora.alpha)).save(path, title=run.folder.name)


def _write_new_words(model: pl.LightningModule, keeper: CheckpointKeeper | None) -> list[Path]:
    """Write the new words of a model beside its last checkpoint, a file each; return the files."""
    manager = getattr(model, "embedding_manager", None)
    if manager is None or keeper is None or not keeper.last_path.exists():
        return []
    # As for adapters: a few kB that other programs load beside the model that they have.
    return write_words(manager.words, keeper.last_path.with_name(NAME))


def _with_base_model(config: RunConfig, start: Start) -> RunConfig:
    """Return the config with the file that the run starts from, for the header of its export."""
    if start.weights is None:
        return config
    # A file may be renamed; its hash still says which base model a result belongs to.
    base = {"file": start.weights.name}
    if start.weights.is_file():
        base["sha256"] = sha256(start.weights)
    return config.having({"run.base_model": base})


def _export(
    state: Mapping[str, Tensor], config: RunConfig, run: Run, steps: int, images: Mapping[str, int]
) -> Path:
    """Write the weights alone, in the precision that `run.export` asks for."""
    precision = str(config.export)
    path = run.checkpoints / f"{run.folder.name}-{precision}.safetensors"
    weights = Checkpoint.of_run(path, state, config.content, steps, images)
    # What other programs expect: no adapters, and one set of weights.
    weights.merged().for_sampling().save(path, DTYPES[precision])
    return path


def _keeper(trainer: pl.Trainer) -> CheckpointKeeper | None:
    """Return the callback that writes checkpoints, if there is one."""
    return _only(trainer, CheckpointKeeper)


def _only(trainer: pl.Trainer, kind: type[Kept]) -> Kept | None:
    """Return the callback of a kind, or None where the config switched it off."""
    for callback in callbacks_of(trainer):
        if isinstance(callback, kind):
            return callback
    return None


class _Announcement(pl.Callback):
    """Logs the start summary, once the images are there and the devices are known."""

    def __init__(
        self, run: Run, weights: str, resumed: Resumed | None, config: RunConfig, engine: str
    ):
        self.run, self.weights, self.resumed, self.config = run, weights, resumed, config
        self.engine = engine
        self.parameters = ""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Before the strategy shards the weights, so that all of them are counted.
        self.parameters = summary.parameters(pl_module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            # Count again: adapters are new since `setup`. Sharded weights are not all here any
            # more, so the first count stays.
            parameters = self.parameters if is_sharded(trainer) else summary.parameters(pl_module)
            data = trainer.datamodule  # type: ignore[attr-defined]
            class_word = "" if self.resumed else class_word_line(self.config, data)
            log.info(
                summary.start(
                    *(trainer, pl_module, data, self.run, self.weights, parameters, self.resumed),
                    class_word=class_word,
                    engine=self.engine,
                )
            )


def set_learning_rates(model: Any, config: RunConfig, trainer: pl.Trainer, batch_size: int) -> None:
    """Give the model `base_learning_rate`.

    With `scale_lr`, multiply all rates by accumulated batches, devices and batch size.
    """
    model.learning_rate = base = config.base_learning_rate
    if not config.scale_lr:
        return
    # As LDM does: a step over n times as many images gets n times the rate.
    factors = (trainer.accumulate_grad_batches, trainer.world_size, batch_size)
    model.learning_rate = math.prod(factors, start=base)
    # The text encoder may have a rate of its own.
    text_training = getattr(model, "text_training", None)
    if text_training:
        model.text_training = text_training.scaled(*factors)
    log.info(
        "learning rate %.3g = %.3g x %d accumulated x %d devices x %d images",
        model.learning_rate,
        base,
        *factors,
    )
