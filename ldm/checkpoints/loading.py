"""Fill models with a checkpoint's weights, with a report."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoints.ema import AVERAGES, has_averages
from ldm.checkpoints.reading import read_checkpoint, state_dict_of
from ldm.errors import UserError
from ldm.util import instantiate_from_config

log = logging.getLogger(__name__)

# What a model can do without: made anew with the model, or only for sampling.
OPTIONAL_SUFFIXES = ("position_ids",)
OPTIONAL_PREFIXES = (AVERAGES,)


def describe(state: Mapping[str, Tensor]) -> str:
    """What a checkpoint holds, for a report: the family, how many tensors of which types, averages or not."""
    from ldm.checkpoints.families import recognise

    family = recognise(state)
    types = sorted({str(value.dtype).removeprefix("torch.") for value in state.values() if value.is_floating_point()})
    averages = ", averaged weights beside the trained ones" if has_averages(state) else ""
    return f"{family.name if family else 'weights'}, {len(state)} tensors ({', '.join(types)}){averages}"


@dataclass(frozen=True)
class LoadReport:
    """What a checkpoint held for a model: key names."""

    used: list[str]
    missing: list[str]
    unexpected: list[str]

    def __str__(self) -> str:
        parts = [f"{len(self.used)} tensors used"]
        for name in ("missing", "unexpected"):
            if keys := getattr(self, name):
                parts.append(f"{len(keys)} {name} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})")
        return "; ".join(parts)


def compare(model: nn.Module, state: Mapping[str, Tensor], path: str | Path, ignore: Iterable[str] = ()) -> LoadReport:
    """Which of a checkpoint's tensors the model uses, without loading them.

    Raises:
        UserError: a tensor has another shape than the model's, or one is missing that the model needs.
    """
    ignore = tuple(ignore)
    wanted = {key: value for key, value in model.state_dict().items() if not (ignore and key.startswith(ignore))}
    used = [key for key in wanted if key in state]
    missing = [key for key in wanted if key not in state]
    optional = OPTIONAL_PREFIXES + _optional_keys(model)
    needed = [k for k in missing if not (k.endswith(OPTIONAL_SUFFIXES) or k.startswith(optional))]
    for key in used:
        if state[key].shape != wanted[key].shape:
            raise UserError(
                f"{path}: '{key}' has shape {list(state[key].shape)}, the config's model has "
                f"{list(wanted[key].shape)}: {_advice(state)}"
            )
    if needed:
        raise UserError(
            f"{path}: {len(needed)} of the model's {len(wanted)} tensors are missing, first '{needed[0]}' "
            f"(the file has {len(state)}, first '{next(iter(state), None)}'): {_advice(state)}"
        )
    return LoadReport(used, missing, [key for key in state if key not in wanted])


def _optional_keys(model: nn.Module) -> tuple[str, ...]:
    """Beginnings of the keys that modules can do without in a checkpoint, as their `optional_keys` say."""
    modules = model.named_modules()
    return tuple(
        f"{name}.{key}" if name else key for name, module in modules for key in getattr(module, "optional_keys", ())
    )


def _advice(state: Mapping[str, Tensor]) -> str:
    """Which config fits a checkpoint that does not fit the one at hand."""
    from ldm.checkpoints.families import recognise

    if family := recognise(state):
        return f"the file is {family}"
    return "use the config that this checkpoint was made with"


def load_state(
    model: nn.Module, state: Mapping[str, Tensor], path: str | Path, ignore: Iterable[str] = ()
) -> LoadReport:
    """Copy a checkpoint's tensors into the model; raises as `compare` does, before anything is changed."""
    report = compare(model, state, path, ignore)
    model.load_state_dict({key: state[key] for key in report.used}, strict=False)
    log.info("%s: %s", path, report)
    return report


def adopt_state(
    model: nn.Module, state: Mapping[str, Tensor], path: str | Path, dtype: torch.dtype | None = None
) -> LoadReport:
    """Make a checkpoint's tensors the model's own instead of copying them: there is never a second copy.

    Those of a mapped file stay in it until they are written to (which the file does not see) or moved to a device:
    meanwhile the file may be replaced, as this project does, but not be written over in place.

    Args:
        dtype: of all matrices and convolutions; by default each has that of the model.

    Raises:
        UserError: as `compare` does, before anything is changed.
    """
    report = compare(model, state, path)
    own = model.state_dict()

    def fitting(key: str) -> Tensor:
        value, wanted = state[key], own[key].dtype
        return value.to(dtype if dtype and value.is_floating_point() and value.ndim > 1 else wanted)

    model.load_state_dict({key: fitting(key) for key in report.used}, strict=False, assign=True)
    log.info("%s: %s", path, report)
    return report


def load_into(module: nn.Module, path: str | Path, ignore_keys: Iterable[str] = ()) -> LoadReport:
    """Load a checkpoint file into a module; keys that start with one of `ignore_keys` stay as they are."""
    return load_state(module, state_dict_of(read_checkpoint(path), path), path, ignore_keys)


class EmptyInit(torch.overrides.TorchFunctionMode):
    """Inside, the initialisation that layers do by default is skipped: for models that a checkpoint will fill.

    Saves the time, and the memory of pages that nobody touches.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def without_initial_weights(config: Any) -> Any:
    """The config without the `ckpt_path`s in it: its weights come from elsewhere, and those files may be gone."""
    if isinstance(config, Mapping):
        return {key: without_initial_weights(value) for key, value in config.items() if key != "ckpt_path"}
    return [without_initial_weights(value) for value in config] if isinstance(config, list) else config


def _is_made_anyway(key: str) -> bool:
    """Whether a model has a tensor without a random initialisation."""
    return key.endswith(OPTIONAL_SUFFIXES) or key.startswith(OPTIONAL_PREFIXES)


def instantiate_filled(
    config: Mapping[str, Any], state: Mapping[str, Tensor], path: str | Path, dtype: torch.dtype | None = None
) -> tuple[Any, LoadReport]:
    """The model of a config with a checkpoint's tensors as its own, see `adopt_state`; raises as `compare` does.

    No weight is initialised that the checkpoint then overwrites, and none is there twice; but where the checkpoint
    lacks some that need an initialisation, the whole model is initialised, and is there twice for a moment.
    """
    config = without_initial_weights(config)
    with EmptyInit():
        model = instantiate_from_config(config, "model")
    if any(not _is_made_anyway(key) for key in compare(model, state, path).missing):
        model = instantiate_from_config(config, "model")
    report = adopt_state(model, state, path, dtype)
    if any(key.startswith(OPTIONAL_PREFIXES) for key in report.missing):
        model.model_ema = type(model.model_ema)(model.model)  # averages start from what was loaded
    return model, report
