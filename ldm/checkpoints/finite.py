"""Values in weights that are no numbers (NaN, infinity): no model works with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.errors import UserError


def is_finite(value: Tensor) -> bool:
    """Return whether all values are numbers; that is one sum, without a tensor in between."""
    if not value.is_floating_point():
        return True
    # NaN and infinity are never lost in a sum. Large numbers may overflow in it, so then each is
    # looked at.
    with torch.no_grad():
        return bool(value.sum(dtype=torch.float32).isfinite()) or bool(value.isfinite().all())


def first_not_finite(state: Mapping[str, Tensor], keys: Iterable[str]) -> str | None:
    """Return the first of the keys whose tensor has values that are no numbers; None for none."""
    return next((key for key in keys if not is_finite(state[key])), None)


def check_usable(
    model: nn.Module, state: Mapping[str, Tensor], keys: Iterable[str], path: str | Path
) -> None:
    """Raise a `UserError` if weights that a model is about to take have values that are no numbers.

    A buffer may be infinite by its nature, as the mask of a text encoder is; a NaN is always wrong.
    """
    of_training = {name for name, _ in model.named_parameters()}
    for key in keys:
        if is_finite(state[key]) or (key not in of_training and not state[key].isnan().any()):
            continue
        raise UserError(
            f"{path}: '{key}' has values that are no numbers (NaN or infinity): the file is "
            "broken: download it again, or take an earlier checkpoint"
        )
