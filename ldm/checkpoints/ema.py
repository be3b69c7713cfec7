"""Which of a checkpoint's weights: as the last step left them, or averaged (EMA)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ldm.errors import UserError

AVERAGES = "model_ema."  # how the keys of a UNet's averaged weights begin


def has_averages(state: Mapping[str, Tensor]) -> bool:
    """Whether a checkpoint has averaged weights beside the last ones."""
    return any(key.startswith(AVERAGES) for key in state)


def ema_weights(state: Mapping[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """A checkpoint's weights with the averages (`model_ema.*`) in the places of what they average.

    Raises:
        UserError: it has no averages.
    """
    averages = {key.removeprefix(AVERAGES): value for key, value in state.items() if key.startswith(AVERAGES)}
    shadowed = {key: key.removeprefix("model.").replace(".", "") for key in state if key.startswith("model.")}
    found = {key: averages[name] for key, name in shadowed.items() if name in averages}
    if not found:
        raise UserError(f"{path}: no averaged weights ({AVERAGES}*) in it")
    return {**without_averages(state), **found}


def without_averages(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's weights as the last step left them, alone."""
    return {key: value for key, value in state.items() if not key.startswith(AVERAGES)}


WEIGHTS = ("trained", "ema")  # which of a checkpoint's weights: as the last step left them, or averaged


def weights_to_sample_from(state: Mapping[str, Tensor], path: str | Path, weights: str | None) -> dict[str, Tensor]:
    """One copy of the weights: the averaged ones where there are any, unless `weights` asks for the trained ones."""
    averaged = weights == "ema" or (weights is None and has_averages(state))
    return ema_weights(state, path) if averaged else without_averages(state)


def weights_to_train(
    state: Mapping[str, Tensor], path: str | Path, weights: str | None, averages: bool
) -> Mapping[str, Tensor]:
    """The trained weights, unless `weights` asks for the averaged ones; with the `averages` if they are to go on."""
    if weights == "ema":
        return ema_weights(state, path)
    return state if averages else without_averages(state)
