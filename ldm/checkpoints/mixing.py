"""Trained weights interpolated with the weights that they were trained from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoints.checkpoint import Checkpoint
from ldm.checkpoints.export import sha256
from ldm.checkpoints.headers import kind_of
from ldm.checkpoints.layouts import TEXT, UNET
from ldm.config import RunConfig
from ldm.errors import UserError, check_share

WORDS = "token_embedding.weight"  # words may have been added to the trained model's, at the end
SCHEDULE = "alphas_cumprod"


def mixed(trained: Checkpoint, base: Checkpoint, share: float) -> Checkpoint:
    """Return (1 - share) x trained + share x base, of the UNet and of the text encoder.

    A model that has learned its subject too well gets back some of what it knew before (after
    Wortsman et al., 2109.01903). The autoencoder, which DreamBooth does not train, stays that of
    `trained`. Each tensor is computed in float32, and keeps the precision of `trained`.

    Args:
        share: of the base weights; 0 leaves the trained ones, 1 takes the base's.

    Raises:
        UserError: the two are not of one kind, or do not differ.
    """
    check_share("share", share)
    check_same_kind(trained, base)
    state, differs = dict(trained.state), False
    for key, tuned in trained.state.items():
        if not _is_mixed(key, tuned):
            continue
        rows = len(base.state[key]) if key.endswith(WORDS) else None
        other = base.state[key].float()
        tuned_rows = tuned[:rows].float()
        differs = differs or not torch.equal(tuned_rows, other)
        mix = torch.lerp(tuned_rows, other, share).to(tuned.dtype)
        state[key] = mix if rows is None else torch.cat([mix, tuned[rows:]])
    if not differs:
        raise UserError(
            f"{base.path}: has the same weights as {trained.path}: give the model that it was "
            "trained from"
        )
    facts = {**trained.facts, "mixed": {"share": share, **_named(base)}}
    return replace(trained, state=state, facts=facts)


def check_same_kind(trained: Checkpoint, base: Checkpoint) -> None:
    """Raise a `UserError` unless weights of `base` may stand in the places of those of `trained`.

    They need the same networks, and outputs that mean the same: the noise or the velocity, at the
    same noise levels, of latents of the same scale.
    """
    for whole in (trained, base):
        whole.check_whole()

    # The networks: each of the trained model's weights, and no further one of the UNet.
    ours = {key: value for key, value in trained.state.items() if _is_mixed(key, value)}
    for key, value in ours.items():
        other = base.state.get(key)
        if other is None or not _same_shape(key, value, other):
            shapes = f"{_shape(other)}, not {_shape(value)}"
            raise _other_kind(trained, base, f"'{key}' has the shape {shapes}")
    further = [key for key in base.state if key.startswith(UNET) and key not in ours]
    if further:
        raise _other_kind(trained, base, f"it has a further '{further[0]}'")

    # What the networks compute. Where a config is needed to know, `fitting_config` asks for it.
    configs = [whole.for_sharing().fitting_config() for whole in (trained, base)]
    kinds = [kind_of(whole.state, c) for whole, c in zip((trained, base), configs)]
    facts = [{**kind, **_scale(config)} for kind, config in zip(kinds, configs)]
    for name in ("version", "inpaints", "predicts", "scale_factor"):
        mine, other = (found.get(name) for found in facts)
        if mine != other:
            raise _other_kind(trained, base, f"{name} is {other}, not {mine}")
    schedules = [
        replace(whole, config=config).complete().state.get(SCHEDULE)
        for whole, config in zip((trained, base), configs)
    ]
    if not _close(*schedules):
        raise _other_kind(trained, base, "it has another noise schedule")


def _is_mixed(key: str, value: Tensor) -> bool:
    return key.startswith((UNET, TEXT)) and value.is_floating_point()


def _same_shape(key: str, ours: Tensor, other: Tensor) -> bool:
    if key.endswith(WORDS):
        return ours.shape[1:] == other.shape[1:] and len(ours) >= len(other)
    return ours.shape == other.shape


def _shape(value: Tensor | None) -> str:
    return "none (it is missing)" if value is None else "x".join(map(str, value.shape))


def _scale(config: Mapping[str, object]) -> dict[str, Any]:
    return {"scale_factor": RunConfig(config).get("model.params.scale_factor", 1.0)}


def _close(first: Tensor | None, second: Tensor | None) -> bool:
    """Tell whether two noise schedules are the same but for rounding."""
    if first is None or second is None or first.shape != second.shape:
        return False
    return torch.allclose(first.float(), second.float(), rtol=1e-4, atol=1e-7)


def _other_kind(trained: Checkpoint, base: Checkpoint, why: str) -> UserError:
    return UserError(
        f"{base.path}: another kind of model than {trained.path} ({why}): give the one that it "
        "was trained from"
    )


def _named(base: Checkpoint) -> dict[str, str]:
    """Return the name of a base model's file and its hash, which stays when a file is renamed."""
    named = {"file": base.path.name}
    if base.path.is_file():
        named["sha256"] = sha256(base.path)
    return named
