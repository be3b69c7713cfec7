"""Fill models with a checkpoint's weights, with a report."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoints.diffusers_format import with_names_of_text_encoder
from ldm.checkpoints.ema import has_averages
from ldm.checkpoints.families import recognise
from ldm.checkpoints.finite import check_usable
from ldm.checkpoints.layouts import AVERAGES, NETWORKS, NEW_WORDS, UNET, absent_networks
from ldm.checkpoints.other_files import of_weights
from ldm.checkpoints.reading import read_checkpoint, state_dict_of
from ldm.errors import UserError
from ldm.util import instantiate_from_config

log = logging.getLogger(__name__)

# What a model can do without: numbers from 0 that are made with the model, or only for sampling.
OPTIONAL_SUFFIXES = ("position_ids",)
OPTIONAL_PREFIXES = (AVERAGES,)


def describe(state: Mapping[str, Tensor]) -> str:
    """Return what a checkpoint holds, for a report: the kind, how many tensors of which types,
    averages or not.
    """
    family = recognise(state)
    other = of_weights(state)
    if family:
        name = family.name
    else:
        name = other.name if other else "weights"
    types = sorted(
        {
            str(value.dtype).removeprefix("torch.")
            for value in state.values()
            if value.is_floating_point()
        }
    )
    averages = ", averaged weights beside the trained ones" if has_averages(state) else ""
    return f"{name}, {len(state)} tensors ({', '.join(types)}){averages}"


@dataclass(frozen=True)
class LoadReport:
    """What a checkpoint held for a model: names of tensors."""

    used: list[str]
    missing: list[str]
    unexpected: list[str]
    built: list[str] = field(default_factory=list)  # missing, and determined by the config

    def __str__(self) -> str:
        parts = [f"{len(self.used)} tensors used"]
        if self.built:
            parts.append(f"{len(self.built)} built from the config")
        for name, keys in (("missing", self.missing), ("unexpected", self.unexpected)):
            if keys:
                first = ", ".join(keys[:3] + ["..."] * (len(keys) > 3))
                parts.append(f"{len(keys)} {name} ({first})")
        return "; ".join(parts)


def compare(
    model: nn.Module, state: Mapping[str, Tensor], path: str | Path, ignore: Iterable[str] = ()
) -> LoadReport:
    """Return which of a checkpoint's tensors the model uses, without loading them.

    Raises:
        UserError: a tensor has another shape than the model's, one is missing that the model needs,
            or the UNet in the file has more of them: the model would compute something else.
    """
    ignore = tuple(ignore)
    wanted = {
        key: value
        for key, value in model.state_dict().items()
        if not (ignore and key.startswith(ignore))
    }
    used = [key for key in wanted if key in state]
    of_config = config_keys(model)
    absent = [key for key in wanted if key not in state]
    built = [key for key in absent if key in of_config or key.endswith(OPTIONAL_SUFFIXES)]
    missing = [key for key in absent if key not in built]
    unexpected = [key for key in state if key not in wanted]
    optional = OPTIONAL_PREFIXES + _optional_keys(model)
    needed = [key for key in missing if not key.startswith(optional)]
    wrong = [key for key in used if state[key].shape != wanted[key].shape]
    more = (
        [key for key in unexpected if key.startswith(UNET)]
        if any(key.startswith(UNET) for key in wanted)
        else []
    )

    # Weights of something else are named as what they are, not by their first tensor.
    other = of_weights(state) if wrong or needed or more else None
    if other:
        raise UserError(f"{path}: {other}")
    if wrong:
        key = wrong[0]
        raise UserError(
            f"{path}: '{key}' has shape {list(state[key].shape)}, the config's model has "
            f"{list(wanted[key].shape)}: {_advice(state)}"
        )
    if needed:
        raise UserError(
            f"{path}: {len(needed)} of the model's {len(wanted)} tensors are missing, first "
            f"'{needed[0]}' "
            f"(the file has {len(state)}, first '{next(iter(state), None)}'): {_advice(state)}"
        )
    if more:
        raise UserError(
            f"{path}: the UNet in it has {len(more)} tensors that the config's model has no "
            "place for, first "
            f"'{more[0]}': {_advice(state)}"
        )
    return LoadReport(used, missing, unexpected, built)


def _optional_keys(model: nn.Module) -> tuple[str, ...]:
    """Return the beginnings of keys that modules can do without in a checkpoint, as their
    `optional_keys` say.
    """
    return tuple(_keys_of(model, "optional_keys"))


def config_keys(model: nn.Module) -> set[str]:
    """Return the keys of what the config alone determines, as modules' `config_keys` say."""
    return set(_keys_of(model, "config_keys"))


def _keys_of(model: nn.Module, attribute: str) -> list[str]:
    found = []
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        found += [prefix + key for key in getattr(module, attribute, ())]
    return found


def _advice(state: Mapping[str, Tensor]) -> str:
    """Return which config fits a checkpoint that does not fit the one at hand, or which network it
    lacks.
    """
    absent = absent_networks(state)
    if 0 < len(absent) < len(NETWORKS):
        return f"it has no {' and no '.join(absent)}: a file with all three networks is needed"
    family = recognise(state)
    return (
        f"the file is {family}" if family else "use the config that this checkpoint was made with"
    )


def load_state(
    model: nn.Module, state: Mapping[str, Tensor], path: str | Path, ignore: Iterable[str] = ()
) -> LoadReport:
    """Copy a checkpoint's tensors into the model; raises as `compare` does, before anything is
    changed.
    """
    report = compare(model, state, path, ignore)
    check_usable(model, state, report.used, path)
    model.load_state_dict({key: state[key] for key in report.used}, strict=False)
    log.info("%s: %s", path, report)
    return report


def adopt_state(
    model: nn.Module,
    state: Mapping[str, Tensor],
    path: str | Path,
    dtype: torch.dtype | None = None,
) -> LoadReport:
    """Make a checkpoint's tensors the model's own instead of copying them: there is never a second
    copy.

    Those of a mapped file stay in it until they are written to (which the file does not see) or
    moved to a device: meanwhile the file may be replaced, as this project does, but not be written
    over in place.

    Args:
        dtype: of all matrices and convolutions; by default each has that of the model.

    Raises:
        UserError: as `compare` does, before anything is changed.
    """
    report = compare(model, state, path)
    check_usable(model, state, report.used, path)
    own = model.state_dict()

    def fitting(key: str) -> Tensor:
        value, wanted = state[key], own[key].dtype
        if dtype and value.is_floating_point() and value.ndim > 1:
            wanted = dtype
        if value.is_floating_point() and not wanted.is_floating_point:
            value = value.round()
        return value.to(wanted)

    model.load_state_dict({key: fitting(key) for key in report.used}, strict=False, assign=True)
    log.info("%s: %s", path, report)
    return report


def load_into(module: nn.Module, path: str | Path, ignore_keys: Iterable[str] = ()) -> LoadReport:
    """Load a checkpoint file into a module; keys that start with one of `ignore_keys` stay as they
    are.
    """
    return load_state(module, state_dict_of(read_checkpoint(path), path), path, ignore_keys)


# transformers puts its own functions in the place of torch's while it makes a model.
INITIALISERS = ("torch.nn.init", "transformers.initialization")


class EmptyInit(torch.overrides.TorchFunctionMode):
    """Inside, the initialisation that layers do by default is skipped: for models that a checkpoint
    will fill.

    Saves the time, and the memory of pages that nobody touches.
    """

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) in INITIALISERS:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def instantiate_filled(
    config: Mapping[str, object],
    state: Mapping[str, Tensor],
    path: str | Path,
    dtype: torch.dtype | None = None,
) -> tuple[Any, LoadReport]:
    """Return the model of a config with a checkpoint's tensors as its own, see `adopt_state`.

    No weight is initialised that the checkpoint then overwrites, and none is there twice; but where
    the checkpoint lacks some that need an initialisation, the whole model is initialised, and is
    there twice for a moment.

    Raises:
        UserError: as `compare` does.
    """
    with EmptyInit():
        model = instantiate_from_config(config, "model")
    state = fitted(model, state, path)
    missing = compare(model, state, path).missing
    # Vectors of new words are made of the weights, once these are there.
    made_later = (*OPTIONAL_PREFIXES, NEW_WORDS)
    if not all(key.startswith(made_later) for key in missing):
        model = instantiate_from_config(config, "model")
    report = adopt_state(model, state, path, dtype)
    if any(key.startswith(OPTIONAL_PREFIXES) for key in report.missing):
        # Averages start from what was loaded.
        model.model_ema = type(model.model_ema)(model.model, float(model.model_ema.decay))
    return model, report


# ---- what the model says about the file ----------------------------------------------------------


def fitted(model: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> Mapping[str, Tensor]:
    """Return a checkpoint's tensors as the config's model has them: its text encoder's names, a
    schedule to trust.
    """
    own = model.state_dict()
    state = with_names_of_text_encoder(state, own)
    return with_exact_schedule(state, {key: own[key] for key in config_keys(model)}, path)


def with_exact_schedule(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], path: str | Path
) -> Mapping[str, Tensor]:
    """Return the tensors with a schedule in full precision: the file's, or `own`, which the
    config's model has.

    A schedule that is there as a whole, in float32, is the file's affair. One that was rounded with
    the weights, or of which a part was left out, is built from the config, if it is the config's.

    Raises:
        UserError: a part of a schedule that is not the config's.
    """
    theirs = {key: state[key] for key in own if key in state and state[key].shape == own[key].shape}
    if not theirs or len(theirs) < len([key for key in own if key in state]):
        return state  # none, or of another length, which does not fit anyway
    exact = all(
        torch.finfo(value.dtype).bits >= 32
        for value in theirs.values()
        if value.is_floating_point()
    )
    is_config_s = all(
        _same_up_to_rounding(value, own[key]) for key, value in theirs.items() if key in TELLING
    )
    rescaled = "betas" in own and bool(
        own["betas"][-1] == 1
    )  # zero terminal SNR, from any base model
    if len(theirs) == len(own) and exact:
        if not is_config_s and not rescaled:
            log.warning(
                "%s: its noise schedule is not the config's: that of the file is used", path
            )
        return state
    if is_config_s or rescaled:
        return {**state, **own}
    if len(theirs) == len(own):
        log.warning(
            "%s: its noise schedule is not the config's, and is rounded to %s", path, _types(theirs)
        )
        return state
    raise UserError(
        f"{path}: it has only {', '.join(theirs)} of its noise schedule, which is not the "
        "config's: give the config "
        "that this checkpoint was made with"
    )


TELLING = ("betas", "alphas_cumprod")  # the buffers that all others of a schedule follow from


def _same_up_to_rounding(value: Tensor, exact: Tensor) -> bool:
    tolerance = 4 * max(torch.finfo(value.dtype).eps, 1e-6)
    return torch.allclose(value.double(), exact.double(), rtol=tolerance, atol=tolerance**2)


def _types(tensors: Mapping[str, Tensor]) -> str:
    return " and ".join(
        sorted({str(value.dtype).removeprefix("torch.") for value in tensors.values()})
    )
