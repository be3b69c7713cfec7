"""`train`: a checked config and a run become a trained model."""

from __future__ import annotations

import logging
import signal
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from ldm.callbacks.checkpoints import AtomicCheckpointIO, CheckpointKeeper, InterruptHandler
from ldm.callbacks.setup import SetupCallback
from ldm.callbacks.timing import TimingCallback
from ldm.checkpoint import instantiate_filled, read_checkpoint, state_dict_of
from ldm.errors import UserError
from ldm.training import defaults, summary
from ldm.training.run import Run
from ldm.util import instantiate_from_config

log = logging.getLogger(__name__)

INTERRUPTED = 128 + signal.SIGINT  # the exit status of a program that Ctrl-C ended


@dataclass(frozen=True)
class Trained:
    """What `train` made, and whether Ctrl-C ended it."""

    model: pl.LightningModule
    data: pl.LightningDataModule
    trainer: pl.Trainer
    run: Run
    interrupted: bool = False


@dataclass(frozen=True)
class Start:
    """What a run starts from, beside its config.

    `weights` are a checkpoint's, `embeddings` a textual-inversion file's; `init_word` gives the identifier
    another word's embedding.
    """

    weights: Path | None = None
    embeddings: Path | None = None
    init_word: str | None = None


def train(config: Mapping[str, Any], run: Run, start: Start | None = None, test: bool = False) -> Trained:
    """Train as `config` says, into `run`'s folder.

    Args:
        config: plain containers, checked by `ldm.config.check_config`: model, data, lightning, run.
        run: a new folder, or one with a checkpoint to go on from.
        start: the initial weights of a new run.
        test: run the config's test set afterwards, if it has one.

    Raises:
        UserError: for what the user gave, before anything is written.
    """
    start = start or Start()
    _quiet_lightning()
    seed = config.get("run", {}).get("seed", defaults.SEED)
    pl.seed_everything(seed, workers=True, verbose=False)
    data = instantiate_from_config(config["data"], "data", **_seeded(config["data"], seed))
    data.check()  # images that do not decode, before the minutes that a large model takes to build
    trainer = build_trainer(config, run)
    model, report = build_model(config["model"], start, resumes=run.resume_from is not None)
    model.learning_rate = learning_rate(config, trainer, data.batch_size)

    trainer.callbacks.append(_Announcement(run, report))
    # Setting up after the class images may have been made: Lightning calls prepare_data first.
    trainer.fit(model, datamodule=data, ckpt_path=run.resume_from, weights_only=False)

    keeper, timing, interrupts = (_only(trainer, kind) for kind in (CheckpointKeeper, TimingCallback, InterruptHandler))
    if trainer.is_global_zero:
        prompts = data.summary()["subject_prompts"]
        log.info(summary.end(trainer, keeper, timing, prompts[0] if prompts else None))
    if test and "test" in data.datasets and not interrupts.interrupted:
        trainer.test(model, datamodule=data)
    return Trained(model, data, trainer, run, interrupts.interrupted)


def _quiet_lightning() -> None:
    """Silence what Lightning says of every run: its start summary is ours, and the rest is as intended."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for message in (
        r".*you defined a `validation_step` but have no `val_dataloader`.*",
        r".*module\(s\) in eval mode at the start of training.*",  # the frozen networks
        r".*does not have many workers.*",
        r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
        r".*exists and is not empty.*",  # a resumed run's checkpoints
        r".*GPU available but not used.*",
    ):
        warnings.filterwarnings("ignore", message=f"(?i){message}")


def _seeded(config: Mapping[str, Any], seed: int) -> dict[str, Any]:
    return {} if "seed" in (config.get("params") or {}) else {"seed": seed}


def _only(trainer: Any, kind: type) -> Any:
    return next(callback for callback in trainer.callbacks if isinstance(callback, kind))


class _Announcement(pl.Callback):
    """Logs the start summary, once the images are there and the devices are known."""

    def __init__(self, run: Run, weights: str):
        self.run, self.weights = run, weights

    def on_fit_start(self, trainer: Any, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            log.info(summary.start(trainer, pl_module, trainer.datamodule, self.run, self.weights))


def build_model(config: Mapping[str, Any], start: Start, resumes: bool) -> tuple[Any, str]:
    """The model with its initial weights, and a line that says where they are from.

    The checkpoint is read once, and no weight is initialised that it will overwrite.
    """
    if resumes:
        return instantiate_from_config(_target(config), "model"), ""
    if start.weights is None:
        model, report = instantiate_from_config(_target(config), "model"), "newly initialised"
    else:
        model, report = _build_filled(config, start.weights)
    if start.embeddings or start.init_word:
        from ldm.modules.embedding_manager import EmbeddingManager

        personalization = config.get("params", {}).get("personalization_config") or {}
        manager = EmbeddingManager(model.cond_stage_model, **(personalization.get("params") or {}))
        if start.init_word:
            manager.initialize(start.init_word)
            report += f"; the identifier starts as '{start.init_word}'"
        if start.embeddings:
            report += f"; embeddings of {', '.join(manager.load(start.embeddings))}"
    return model, report


def _build_filled(config: Mapping[str, Any], path: Path) -> tuple[Any, str]:
    state = state_dict_of(read_checkpoint(path), path)
    model, report = instantiate_filled(_target(config), state, path)
    if getattr(model, "model_ema", None) is not None and not any(key.startswith("model_ema.") for key in state):
        model.model_ema = type(model.model_ema)(model.model)  # averages start from what was loaded
    return model, f"{path}: {report}"


def _target(config: Mapping[str, Any]) -> dict[str, Any]:
    """The model section without the learning rate, which is the trainer's business."""
    return {key: value for key, value in config.items() if key != "base_learning_rate"}


def learning_rate(config: Mapping[str, Any], trainer: pl.Trainer, batch_size: int) -> float:
    """`base_learning_rate`, with `scale_lr` times accumulated batches, devices and batch size."""
    base = config["model"].get("base_learning_rate")
    if not isinstance(base, (int, float)) or base <= 0:
        raise UserError(f"model.base_learning_rate: expected a positive number, got {base!r}")
    if not config.get("run", {}).get("scale_lr"):
        return float(base)
    devices = trainer.world_size
    rate = base * trainer.accumulate_grad_batches * devices * batch_size
    log.info(
        "learning rate %.3g = %.3g x %d accumulated x %d devices x %d images",
        rate,
        base,
        trainer.accumulate_grad_batches,
        devices,
        batch_size,
    )
    return rate


def build_trainer(config: Mapping[str, Any], run: Run) -> Any:
    """Lightning's Trainer with the config's arguments and callbacks over the project's defaults."""
    lightning = config.get("lightning") or {}
    arguments = {**defaults.TRAINER, **(lightning.get("trainer") or {})}
    for key, why in {"callbacks": "lightning.callbacks", "plugins": None}.items():
        if key in arguments:
            raise UserError(f"lightning.trainer.{key}: not settable here{f'; use {why}' if why else ''}")
    arguments.setdefault("logger", [])
    if arguments["logger"] in ([], True):
        arguments["logger"] = _loggers(run)
    callbacks = build_callbacks(lightning, config, run)
    if not arguments["logger"]:
        callbacks = [c for c in callbacks if not isinstance(c, pl.callbacks.LearningRateMonitor)]
    if not arguments.get("enable_progress_bar", True):
        callbacks = [c for c in callbacks if not isinstance(c, pl.callbacks.ProgressBar)]
    try:
        return pl.Trainer(
            **{"default_root_dir": run.folder, **arguments}, callbacks=callbacks, plugins=[AtomicCheckpointIO()]
        )
    except (ValueError, TypeError, pl.utilities.exceptions.MisconfigurationException) as error:
        raise UserError(f"lightning.trainer: {' '.join(str(error).split())}") from error


def _loggers(run: Run) -> list[Any]:
    # A folder for each start: Lightning's CSV logger empties the one it finds.
    return [
        TensorBoardLogger(run.folder, name="tensorboard", version="", default_hp_metric=False),
        CSVLogger(run.folder, name="csv", version=run.stamp, flush_logs_every_n_steps=10),
    ]


def build_callbacks(lightning: Mapping[str, Any], config: Mapping[str, Any], run: Run) -> list[pl.Callback]:
    """The default callbacks, the config's, and the keepers of the run folder and its checkpoints."""
    configured = {name: dict(value) for name, value in defaults.CALLBACKS.items()}
    for name, value in (lightning.get("callbacks") or {}).items():
        known = configured.get(name, {})
        configured[name] = {**known, **value, "params": {**known.get("params", {}), **(value.get("params") or {})}}
    monitor = (config["model"].get("params") or {}).get("monitor")
    return [
        SetupCallback(run, {**config}),
        InterruptHandler(),
        *(instantiate_from_config(value, f"lightning.callbacks.{name}") for name, value in configured.items()),
        _checkpoint_callback(lightning.get("modelcheckpoint") or {}, run, monitor),
    ]


def _checkpoint_callback(given: Mapping[str, Any], run: Run, monitor: str | None) -> pl.Callback:
    default = defaults.MODELCHECKPOINT
    params = {"dirpath": str(run.checkpoints.resolve()), **default["params"], **(given.get("params") or {})}
    target = given.get("target", default["target"])
    if target.rpartition(".")[2] == "ModelCheckpoint":  # Lightning's own, in the configs of others
        target = default["target"]
    if target == default["target"]:
        params = {"score": monitor, **params}
    return instantiate_from_config({"target": target, "params": params}, "lightning.modelcheckpoint")
