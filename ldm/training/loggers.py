"""Where a run's numbers go: TensorBoard and CSV in its folder, and `lightning.trainer.logger`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pytorch_lightning.loggers import TensorBoardLogger

from ldm.callbacks.csv_log import CsvLog
from ldm.errors import UserError, nearest
from ldm.training.run import Run
from ldm.util import instantiate_from_config

WHERE = "lightning.trainer.logger"
OWN = ("tensorboard", "csv")  # always there
# Lightning's loggers by the names that people give them, and the arguments that name the run.
SERVICES = {
    "wandb": (
        "pytorch_lightning.loggers.WandbLogger",
        lambda run: {"name": run.folder.name, "save_dir": run.folder},
    ),
    "mlflow": ("pytorch_lightning.loggers.MLFlowLogger", lambda run: {"run_name": run.folder.name}),
    "comet": ("pytorch_lightning.loggers.CometLogger", lambda run: {"name": run.folder.name}),
    "neptune": ("pytorch_lightning.loggers.NeptuneLogger", lambda run: {"name": run.folder.name}),
}


def make_loggers(given: object, run: Run) -> Any:
    """Make the loggers of a run: its own two, and others that the config names.

    Args:
        given: true for the run's own; false or null for none; the name of a service such as
            `wandb`, a mapping with a `target` and `params`, or a list of these, which come to the
            run's own.

    Raises:
        UserError: an unknown name, or a service whose package is not installed.
    """
    if given is None or given is False:
        return False
    if given is True:
        given = []
    names: list[Any] = list(given) if isinstance(given, (list, tuple)) else [given]
    # A folder for each start: Lightning's CSV logger empties the one it finds.
    own = [
        TensorBoardLogger(run.folder, name="tensorboard", version="", default_hp_metric=False),
        CsvLog(run.folder, name="csv", version=run.stamp, flush_logs_every_n_steps=10),
    ]
    return own + [_service(name, run) for name in names if name not in OWN]


def _service(given: object, run: Run) -> Any:
    if isinstance(given, Mapping):
        return instantiate_from_config(given, WHERE)
    if given not in SERVICES:
        hint = nearest(str(given), [*OWN, *SERVICES])
        accepted = f"true, false, {', '.join([*OWN, *SERVICES])}, or a target with params"
        raise UserError(f"{WHERE}: unknown '{given}'{hint}; accepted: {accepted}")
    target, arguments = SERVICES[given]
    try:
        return instantiate_from_config({"target": target, "params": arguments(run)}, WHERE)
    except UserError as error:
        if not isinstance(error.__cause__, ImportError):
            raise
        raise UserError(f"{WHERE}: {given} needs its package: pip install {given}") from error
