"""Stop a run that learns no more, or that forgets the class, as its losses at fixed noise say."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytorch_lightning as pl

from ldm.callbacks.fixed_loss import FixedLoss
from ldm.callbacks.setup import callbacks_of
from ldm.errors import ParameterError, UserError

log = logging.getLogger(__name__)

WHERE = "lightning.callbacks.early_stop"


class StopOnFixedLoss(pl.Callback):
    """Ends the training as if its last step were done, by the values of `FixedLoss`.

    The same run stops at the same step again, for these values have no noise.

    Args:
        patience: values of the subject's loss without a new lowest one, after which the run stops.
        prior_limit: how many times its first value the prior's loss may have.
    """

    def __init__(self, patience: int | None = None, prior_limit: float | None = None):
        if patience is None and prior_limit is None:
            raise ParameterError("patience", "give it or prior_limit")
        if patience is not None and patience < 1:
            raise ParameterError("patience", f"expected 1 or more, got {patience}")
        if prior_limit is not None and prior_limit <= 1:
            raise ParameterError("prior_limit", f"expected more than 1, got {prior_limit}")
        self.patience, self.prior_limit = patience, prior_limit
        self.lowest, self.waited = math.inf, 0
        self.first_prior: float | None = None
        self._seen, self._asked = -1, -1

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if _fixed_loss(trainer) is None:
            raise UserError(f"{WHERE}: needs lightning.callbacks.fixed_loss, whose values it reads")

    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        self._take(trainer)  # the value from before any step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        reason = self._take(trainer)
        fixed = _fixed_loss(trainer)
        assert fixed is not None
        step = trainer.global_step
        if step % fixed.every_n_steps or step == self._asked:
            return
        self._asked = step
        # One process may have the values alone, and all have to stop at the same step.
        if trainer.strategy.reduce_boolean_decision(bool(reason), all=False):
            log.info("stopped after step %d: %s", step, reason or "as another process says")
            trainer.should_stop = True

    def _take(self, trainer: pl.Trainer) -> str:
        """Take values that are new; return why to stop, or nothing."""
        fixed = _fixed_loss(trainer)
        if fixed is None or fixed.values is None or fixed.values_at <= self._seen:
            return ""
        self._seen = fixed.values_at
        return self._reason(fixed.values)

    def _reason(self, values: dict[str, float]) -> str:
        subject, prior = values.get("subject", math.inf), values.get("prior")
        self.waited = 0 if subject < self.lowest else self.waited + 1
        self.lowest = min(self.lowest, subject)
        if prior is not None and self.first_prior is None:
            self.first_prior = prior
        if self.patience is not None and self.waited >= self.patience:
            return f"the subject's loss has had no lower value for {self.waited} values"
        if self.prior_limit is None or prior is None or self.first_prior is None:
            return ""
        if prior > self.prior_limit * self.first_prior:
            return f"the prior's loss is {prior:.4g}, and was {self.first_prior:.4g} at first"
        return ""

    def state_dict(self) -> dict[str, Any]:
        state = {"lowest": self.lowest, "waited": self.waited, "first_prior": self.first_prior}
        return {**state, "seen": self._seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.lowest, self.waited = state_dict["lowest"], state_dict["waited"]
        self.first_prior, self._seen = state_dict["first_prior"], state_dict["seen"]


def _fixed_loss(trainer: pl.Trainer) -> FixedLoss | None:
    found = [c for c in callbacks_of(trainer) if isinstance(c, FixedLoss)]
    return found[0] if found else None
