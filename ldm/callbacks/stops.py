"""What ends a training early: no step that was whole is lost to a signal or an error."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ldm import distributed, signals
from ldm.callbacks.checkpoints import keeper_of
from ldm.errors import UserError
from ldm.optim.boundary import at_step_boundary
from ldm.optim.in_backward import InBackward

if TYPE_CHECKING:
    from torch.optim import Optimizer

log = logging.getLogger(__name__)


class KeepWholeSteps(pl.Callback):
    """Writes `last.ckpt` of the last whole step when an error or a signal ends the training.

    The weights change only while the optimizer steps. Between two steps the last one can still be
    saved, from the weights as they are and from the positions in the data that are remembered here.
    It has to come behind the checks of a step, which say that its weights are worth nothing, and
    before what may fail once a step is done.
    """

    def __init__(self) -> None:
        self._positions: dict[str, Any] | None = None
        self._changing = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._positions, self._changing = None, False

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        optimizers = [getattr(o, "optimizer", o) for o in trainer.optimizers]
        self._changing |= any(isinstance(optimizer, InBackward) for optimizer in optimizers)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        self._changing = True

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        if at_step_boundary(trainer, batch_idx):
            self._positions, self._changing = _positions(trainer), False

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Save the last whole step, on the first process, and end the others."""
        if not trainer.is_global_zero:
            distributed.tell_failure(trainer, exception)
            return
        at_once = isinstance(exception, signals.Interrupted) and exception.at_once
        children = distributed.take_children(trainer)
        try:
            if not at_once:
                self._save(trainer)
        finally:
            distributed.end_children(children, patience=1.0 if at_once else 5.0)

    def _save(self, trainer: pl.Trainer) -> None:
        """Write the last whole step, unless that is done; raise nothing over what ends the run."""
        keeper, positions = keeper_of(trainer), self._positions
        if keeper is None or positions is None or keeper.last_step == positions["global_step"]:
            return
        step = positions["global_step"]
        if self._changing:
            log.error("step %d cannot be saved: the next one had begun to change the weights", step)
            return
        if distributed.is_sharded(trainer):
            log.error("step %d cannot be saved: each process holds a part of the weights", step)
            return
        try:
            keeper.save_at(trainer, positions)
        except Exception as error:  # a full disk, weights that are not finite, a lost device
            log.error("step %d cannot be saved: %s", step, error)
        else:
            log.info("step %d is saved in %s", step, keeper.last_path)


def _positions(trainer: pl.Trainer) -> dict[str, Any]:
    """Return what a checkpoint says of how far a training is."""
    return {
        "epoch": trainer.current_epoch,
        "global_step": trainer.global_step,
        "loops": trainer._checkpoint_connector._get_loops_state_dict(),
    }


class InterruptHandler(pl.Callback):
    """Ends the run behind the current step when a stop signal came, with `last.ckpt` written.

    SIGUSR1 and SIGUSR2 write it and go on. Of several processes all do what one was asked for.
    While one process alone draws pictures or validates, the run ends in the middle of that.
    """

    def __init__(self) -> None:
        self._hook: RemovableHandle | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        signals.be_patient()
        network = getattr(pl_module, "model", None)
        if trainer.world_size == 1 and isinstance(network, torch.nn.Module):
            # Between two calls of the network, all weights are in their places.
            self._hook = network.register_forward_pre_hook(_stop_outside_of_steps)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        # Of several processes one alone must not leave.
        if trainer.world_size == 1 and batch_idx % trainer.accumulate_grad_batches == 0:
            _stop_if_requested()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        if not at_step_boundary(trainer, batch_idx):
            return
        decide = trainer.strategy.reduce_boolean_decision
        stop = decide(bool(signals.stop_requested()), all=False)
        if not stop and not decide(signals.save_requested(), all=False):
            return
        signals.take_save_request()
        try:
            self._save(trainer)
        except UserError as error:
            if stop or trainer.world_size > 1:
                raise
            log.error("%s; going on, for the signal did not ask to stop", error)
        if stop:
            # What Lightning logs after this hook would be lost with the exception.
            trainer._logger_connector.update_train_step_metrics()
            raise signals.Interrupted(_first_signal(trainer))

    def _save(self, trainer: pl.Trainer) -> None:
        keeper = keeper_of(trainer)
        if keeper is None:
            log.warning(
                "step %d: nothing is saved, for checkpoints are switched off", trainer.global_step
            )
            return
        keeper.save_last_now(trainer)
        log.info("step %d is saved in %s", trainer.global_step, keeper.last_path)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._end()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._end()

    def _end(self) -> None:
        signals.be_patient(False)
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


def _stop_if_requested() -> None:
    if number := signals.stop_requested():
        raise signals.Interrupted(number)


def _stop_outside_of_steps(network: torch.nn.Module, inputs: object) -> None:
    if not network.training:
        _stop_if_requested()


def _first_signal(trainer: pl.Trainer) -> int:
    """Return the number of the signal that this process, or else another one, has received."""
    number = torch.tensor(signals.stop_requested(), device=trainer.strategy.root_device)
    return int(trainer.strategy.reduce(number, reduce_op="max"))
