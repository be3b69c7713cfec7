"""Which values the arguments of Lightning's Trainer may have.

Lightning accepts some that are mistakes: it then trains nothing, divides by zero or ignores them.
Only such arguments are listed. It checks the others itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ldm.errors import UserError


@dataclass(frozen=True)
class Values:
    """A set of values, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any, least: int) -> bool:
    return _is_number(value) and value == int(value) and value >= least


def _is_part(value: Any, least: float) -> bool:
    """Return whether a value is a share up to 1 or a whole number, and not below `least`."""
    return _is_number(value) and value >= least and (value <= 1 or value == int(value))


def _optional(values: Values) -> Values:
    return Values(f"{values.words}, or null", lambda value: value is None or values.holds(value))


BOOLEAN = Values("true or false", lambda value: isinstance(value, bool))
COUNT = Values("a whole number, 1 or more", lambda value: _is_whole(value, 1))
COUNT_OR_NONE_AT_ALL = Values("a whole number, 0 or more", lambda value: _is_whole(value, 0))
LIMIT = Values(
    "a whole number, 1 or more, or -1 for no limit", lambda v: _is_whole(v, -1) and v != 0
)
SOME_PART = Values(
    "a share above 0 and up to 1, or a number of batches", lambda v: _is_part(v, 0) and v > 0
)
PART = Values("a share from 0 to 1, or a number of batches", lambda value: _is_part(value, 0))
NOT_NEGATIVE = Values("a number, 0 or more", lambda value: _is_number(value) and value >= 0)

TRAINER_VALUES: dict[str, Values] = {
    "max_steps": LIMIT,
    "max_epochs": _optional(LIMIT),
    "min_steps": _optional(COUNT_OR_NONE_AT_ALL),
    "min_epochs": _optional(COUNT_OR_NONE_AT_ALL),
    "accumulate_grad_batches": COUNT,
    "num_nodes": COUNT,
    "log_every_n_steps": _optional(COUNT_OR_NONE_AT_ALL),
    "check_val_every_n_epoch": _optional(COUNT),
    "val_check_interval": Values(
        "a share of an epoch above 0, a number of batches, or a time",
        lambda value: value is None or not _is_number(value) or (_is_part(value, 0) and value > 0),
    ),
    "num_sanity_val_steps": Values(
        "a whole number, -1 or more", lambda value: value is None or _is_whole(value, -1)
    ),
    "limit_train_batches": _optional(SOME_PART),
    "limit_val_batches": _optional(PART),
    "limit_test_batches": _optional(PART),
    "limit_predict_batches": _optional(PART),
    "overfit_batches": PART,
    "gradient_clip_val": _optional(NOT_NEGATIVE),
    "reload_dataloaders_every_n_epochs": COUNT_OR_NONE_AT_ALL,
    "fast_dev_run": Values(
        "true, false or a number of steps", lambda v: isinstance(v, bool) or _is_whole(v, 0)
    ),
    "deterministic": Values(
        "true, false or warn", lambda v: v in (None, "warn") or isinstance(v, bool)
    ),
    "benchmark": _optional(BOOLEAN),
    "barebones": BOOLEAN,
    "detect_anomaly": BOOLEAN,
    "sync_batchnorm": BOOLEAN,
    "inference_mode": BOOLEAN,
    "use_distributed_sampler": BOOLEAN,
    "enable_checkpointing": _optional(BOOLEAN),
    "enable_progress_bar": _optional(BOOLEAN),
    "enable_model_summary": _optional(BOOLEAN),
    "enable_autolog_hparams": BOOLEAN,
}


def check_trainer_values(arguments: Mapping[str, object]) -> None:
    """Raise a `UserError` for an argument whose value is a mistake that Lightning does not see."""
    for name, values in TRAINER_VALUES.items():
        if name in arguments and not values.holds(arguments[name]):
            raise UserError(
                f"lightning.trainer.{name}: expected {values.words}, got {arguments[name]!r}"
            )
