"""Lightning's Trainer, with the config's arguments and callbacks over the project's defaults."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.trainer.connectors.signal_connector import _SignalConnector
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from ldm.callbacks.checkpoints import AtomicCheckpointIO
from ldm.callbacks.csv_log import RowsFirst
from ldm.callbacks.first_step import FirstStepCheck
from ldm.callbacks.keep_settings import KeepSettings
from ldm.callbacks.non_finite import StopOnNonFinite
from ldm.callbacks.run_page import LogSettings, RunPage
from ldm.callbacks.setup import SetupCallback, callbacks_of
from ldm.callbacks.stops import InterruptHandler, KeepWholeSteps
from ldm.config import RunConfig
from ldm.errors import ParameterError, UserError, under
from ldm.optim.in_backward import SUFFIX
from ldm.optim.registry import check_name
from ldm.training import defaults
from ldm.training.loggers import make_loggers
from ldm.training.run import Run
from ldm.training.sharding import make_strategy
from ldm.util import check_mapping, instantiate_from_config

NOT_SETTABLE = {
    "callbacks": "lightning.callbacks",
    "plugins": "lightning.trainer.precision and strategy",
    "default_root_dir": "--logdir",
}


def quiet_lightning() -> None:
    """Filter out what Lightning says of every run.

    The start summary is ours, and the rest warns of what is intended.
    """
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for message in (
        r".*you defined a `validation_step` but have no `val_dataloader`.*",
        r".*module\(s\) in eval mode at the start of training.*",  # the frozen networks
        r".*does not have many workers.*",
        r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
        r".*exists and is not empty.*",  # a resumed run's checkpoints
        r".*GPU available but not used.*",
        r".*You have overridden `transfer_batch_to_device`.*",
    ):
        warnings.filterwarnings("ignore", message=f"(?i){message}")


def build_trainer(config: RunConfig, run: Run) -> pl.Trainer:
    """Build the Trainer of a run.

    Raises:
        UserError: an argument that Lightning does not take.
    """
    default = (
        defaults.TRAINER if not config.trainer.get("barebones") else defaults.BAREBONES_TRAINER
    )
    arguments = {**default, **config.trainer}
    for key, instead in NOT_SETTABLE.items():
        if key in arguments:
            raise UserError(f"lightning.trainer.{key}: not settable here; use {instead}")
    if arguments.get("precision") in ("16-true", "bf16-true"):
        # Lightning would round the noise schedule with the weights: its first step would become
        # noiseless.
        raise UserError(
            f"lightning.trainer.precision: {arguments['precision']}: use 16-mixed or bf16-mixed"
        )
    if not arguments.get("barebones"):
        arguments["logger"] = make_loggers(arguments.get("logger", True), run)
    if "strategy" in arguments:
        arguments["strategy"] = make_strategy(arguments["strategy"])
    callbacks = [c for c in build_callbacks(config, run) if not _switched_off(c, arguments)]
    try:
        trainer = pl.Trainer(
            default_root_dir=run.folder,
            **arguments,
            callbacks=callbacks,
            plugins=[AtomicCheckpointIO()],
        )
    except (ValueError, TypeError, AttributeError, ImportError, MisconfigurationException) as error:
        raise UserError(f"lightning.trainer: {' '.join(str(error).split())}") from error
    trainer._signal_connector = NoSignals(trainer)
    return trainer


def tell_config(trainer: pl.Trainer, config: RunConfig) -> None:
    """Give the callbacks that save and log the config what it is now."""
    for callback in callbacks_of(trainer):
        if isinstance(callback, SetupCallback):
            callback.config = dict(config.content)
        elif isinstance(callback, LogSettings):
            callback.use(config.content)


class NoSignals(_SignalConnector):
    """Leave signals to `ldm.signals`.

    After SIGTERM Lightning would end with status 0 and without a checkpoint, and its handler would
    talk to other processes in the middle of whatever they talk about then.
    """

    def register_signal_handlers(self) -> None:
        pass


def check_optimizer(config: RunConfig, trainer: pl.Trainer) -> None:
    """Raise a `UserError` for an unknown optimizer, or for what needs all gradients where it keeps
    none.
    """
    optimizer = config.get("model.params.optimizer")
    if optimizer is None or "model.params.optimizer" in config.get("run.chosen", []):
        return  # what the engine has chosen, it takes back where it does not go
    with under("model.params"):
        check_name(optimizer)
        found = needs_gradients(trainer) if optimizer.endswith(SUFFIX) else []
        if found:
            raise ParameterError(
                "optimizer", f"{optimizer} keeps no gradients, so not with {', '.join(found)}"
            )


def needs_gradients(trainer: Any) -> list[str]:
    """Return the settings of a trainer that need all gradients at once, by name."""
    settings = {
        "lightning.trainer.accumulate_grad_batches": trainer.accumulate_grad_batches > 1,
        "lightning.trainer.gradient_clip_val": bool(trainer.gradient_clip_val),
        "lightning.trainer.precision: 16-mixed": trainer.precision == "16-mixed",
        "several processes": trainer.world_size > 1,
    }
    return [name for name, given in settings.items() if given]


def _switched_off(callback: pl.Callback, arguments: Mapping[str, object]) -> bool:
    """Return whether the Trainer's arguments forbid a callback, which Lightning would refuse to run
    with.
    """
    switches = {
        pl.callbacks.LearningRateMonitor: arguments["logger"],
        pl.callbacks.ProgressBar: arguments.get("enable_progress_bar", True),
        pl.callbacks.Checkpoint: arguments.get("enable_checkpointing", True),
    }
    return any(
        isinstance(callback, kind) and (not on or bool(arguments.get("barebones")))
        for kind, on in switches.items()
    )


def build_callbacks(config: RunConfig, run: Run) -> list[pl.Callback]:
    """Make the default callbacks, the config's, then the keepers of the run folder and its
    checkpoints.
    """
    configured = {name: dict(value) for name, value in defaults.CALLBACKS.items()}
    for name, value in config.section("lightning.callbacks").items():
        if value is None or value is False:  # switched off
            configured.pop(name, None)
            continue
        check_mapping(value, f"lightning.callbacks.{name}")
        known = configured.get(name, {})
        configured[name] = {
            **known,
            **value,
            "params": {**known.get("params", {}), **(value.get("params") or {})},
        }
    made = [
        instantiate_from_config(value, f"lightning.callbacks.{name}")
        for name, value in configured.items()
    ]
    checks = [
        callback for callback in made if isinstance(callback, (StopOnNonFinite, FirstStepCheck))
    ]
    # The page comes behind what it shows: the pictures, and the numbers of the step.
    pages = [callback for callback in made if isinstance(callback, RunPage)]
    return [
        SetupCallback(run, dict(config.content)),
        KeepSettings(),
        LogSettings(config.content),
        *checks,
        KeepWholeSteps(),
        *(callback for callback in made if callback not in (*checks, *pages)),
        RowsFirst(),
        *pages,
        InterruptHandler(),
        _checkpoint_callback(
            config.section("lightning.modelcheckpoint"), run, config.get("model.params.monitor")
        ),
    ]


def _checkpoint_callback(given: Mapping[str, Any], run: Run, monitor: str | None) -> pl.Callback:
    default = defaults.MODELCHECKPOINT
    params = {
        "dirpath": str(run.checkpoints.resolve()),
        **default["params"],
        **(given.get("params") or {}),
    }
    target = given.get("target", default["target"])
    if target.rpartition(".")[2] == "ModelCheckpoint":  # Lightning's own, in the configs of others
        target = default["target"]
    if target == default["target"]:
        params = {"score": monitor, **params}
    return instantiate_from_config(
        {"target": target, "params": params}, "lightning.modelcheckpoint"
    )
