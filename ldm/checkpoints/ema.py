"""Which of a checkpoint's weights: as the last step left them, or averaged (EMA)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ldm.checkpoints.layouts import AVERAGES, ema_name
from ldm.errors import UserError

# What `LitEma` counts with. sd-v1-4.ckpt has these two of it, and no averages.
COUNTERS = frozenset({"model_ema.decay", "model_ema.num_updates"})


def has_averages(state: Mapping[str, Tensor]) -> bool:
    """Whether a checkpoint has averaged weights beside the last ones."""
    return any(key.startswith(AVERAGES) and key not in COUNTERS for key in state)


def ema_weights(state: Mapping[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """Return a checkpoint's weights with the averages (`model_ema.*`) in the places of what they
    average.

    Raises:
        UserError: it has no averages.
    """
    found = {}
    for key in state:
        average = state.get(AVERAGES + ema_name(key))
        if key.startswith("model.") and average is not None:
            found[key] = average
    if not found:
        raise UserError(f"{path}: no averaged weights ({AVERAGES}*) in it")
    return {**without_averages(state), **found}


def without_averages(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a checkpoint's weights as the last step left them, alone."""
    return {key: value for key, value in state.items() if not key.startswith(AVERAGES)}


WEIGHTS = (
    "trained",
    "ema",
)  # which of a checkpoint's weights: as the last step left them, or averaged


def weights_to_sample_from(
    state: Mapping[str, Tensor], path: str | Path, weights: str | None
) -> dict[str, Tensor]:
    """Return one copy of the weights: the averaged ones where there are any, unless `weights` asks
    for the trained.
    """
    if weights == "ema" or (weights is None and has_averages(state)):
        return ema_weights(state, path)
    return without_averages(state)


def weights_to_train(
    state: Mapping[str, Tensor], path: str | Path, weights: str | None, averages: bool
) -> Mapping[str, Tensor]:
    """Return the trained weights, unless `weights` asks for the averaged; with the `averages` if
    they are to go on.
    """
    if weights == "ema":
        return ema_weights(state, path)
    if averages and has_averages(state):
        return state
    return without_averages(state)
