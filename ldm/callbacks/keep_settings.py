"""A run that goes on has the settings of its config, and only the progress of its checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from inspect import signature
from typing import Any

import pytorch_lightning as pl
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ldm.callbacks.setup import callbacks_of

# Entries of a parameter group that are no settings: they have to fit the state that was restored.
NOT_SETTINGS = ("params", "fused", "foreach", "capturable", "differentiable")


class KeepSettings(pl.Callback):
    """Put the config's settings back after Lightning has restored a checkpoint.

    A checkpoint holds settings beside progress: learning rates, a schedule's length, a callback's
    patience. Lightning restores both, so that what the config says now would be without effect.
    This callback notes the settings before that, and puts them back afterwards. Moments, step
    counts and best scores stay as restored. Where the config has not changed, no value does.
    """

    def __init__(self) -> None:
        self._callbacks: list[tuple[pl.Callback, dict[str, Any]]] = []
        self._optimizers: list[tuple[Optimizer, list[dict[str, Any]]]] = []
        self._schedules: list[_Schedule] = []
        self._restored_schedules = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Note the arguments of the callbacks, which Lightning restores first."""
        callbacks = callbacks_of(trainer)
        self._callbacks = [(callback, _arguments(callback)) for callback in callbacks]

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._restored_schedules = len(checkpoint.get("lr_schedulers") or [])

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the settings of the optimizers and schedules, which are not restored yet."""
        self._optimizers = [(optimizer, _settings(optimizer)) for optimizer in trainer.optimizers]
        schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
        self._schedules = [
            _Schedule.of(schedule) for schedule in schedules if isinstance(schedule, LambdaLR)
        ]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the settings back; all is restored by now."""
        if not trainer.ckpt_path:
            return
        for callback, arguments in self._callbacks:
            vars(callback).update(arguments)
        for optimizer, settings in self._optimizers:
            for group, own in zip(optimizer.param_groups, settings):
                group.update(own)
        for number, schedule in enumerate(self._schedules):
            # A schedule that the run did not have so far begins where the run stands.
            step = (
                schedule.scheduler.last_epoch
                if number < self._restored_schedules
                else trainer.global_step
            )
            schedule.put_back(step)


@dataclass(frozen=True)
class _Schedule:
    """The settings of a schedule: the full rates, and the attributes of the functions of a step."""

    scheduler: LambdaLR
    rates: list[float | Tensor]
    functions: list[dict[str, Any]]

    @classmethod
    def of(cls, scheduler: LambdaLR) -> _Schedule:
        functions = [dict(getattr(function, "__dict__", {})) for function in scheduler.lr_lambdas]
        return cls(scheduler, list(scheduler.base_lrs), functions)

    def put_back(self, step: int) -> None:
        """Give the scheduler its settings, and its optimizer the rates of a step."""
        scheduler = self.scheduler
        scheduler.base_lrs, scheduler.last_epoch = list(self.rates), step
        for function, attributes in zip(scheduler.lr_lambdas, self.functions):
            if attributes:
                vars(function).clear()
                vars(function).update(attributes)
        rates: list[float | Tensor] = [
            rate * function(step) for rate, function in zip(self.rates, scheduler.lr_lambdas)
        ]
        for group, rate in zip(scheduler.optimizer.param_groups, rates):
            group["lr"] = rate
        scheduler._last_lr = rates


def _settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the settings of an optimizer's groups."""
    return [
        {name: value for name, value in group.items() if name not in NOT_SETTINGS}
        for group in optimizer.param_groups
    ]


def _arguments(callback: pl.Callback) -> dict[str, Any]:
    """Return the plain values that a callback keeps of its arguments, by their names."""
    kept = vars(callback)
    plain = (bool, int, float, str, type(None))
    return {
        name: kept[name]
        for name in signature(type(callback)).parameters
        if isinstance(kept.get(name, ...), plain)
    }
