"""Checkpoints: read without running their code, load with a report, write without losing what was there."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.unpickle import SAFE_PICKLE
from ldm.util import instantiate_from_config

log = logging.getLogger(__name__)

AVERAGES = "model_ema."  # how the keys of a UNet's averaged weights begin
SHARD_INDEX = ".safetensors.index.json"
# What a model can do without: made anew with the model, or only for sampling.
OPTIONAL_SUFFIXES = ("position_ids",)
OPTIONAL_PREFIXES = (AVERAGES,)


# Reading


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Everything a `.ckpt`, `.pt`, `.bin` or `.safetensors` file holds, on the CPU, memory-mapped where possible.

    Of sharded safetensors the path is that of the index, `*.safetensors.index.json`. Pickled classes other than
    tensors and plain containers come back as `Stub`s; no code of the file runs.

    Raises:
        UserError: no such file, or one that is truncated or not a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    if path.name.endswith(SHARD_INDEX):
        return _read_shards(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        content = torch.load(
            path, map_location="cpu", mmap=_is_plain_zip(path), weights_only=False, pickle_module=SAFE_PICKLE
        )
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can cause any
        raise UserError(f"{path}: truncated or not a checkpoint: {_first_line(error)}") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: not a checkpoint: it holds a {type(content).__name__}, not a mapping")
    return dict(content)


def _is_plain_zip(path: Path) -> bool:
    """Whether torch will read the file as a zip archive rather than in its format before that.

    Raises:
        UserError: it would do more than unpickle: run TorchScript, extract a tar archive, or inflate records.
    """
    if tarfile.is_tarfile(path):
        raise UserError(f"{path}: not a checkpoint: a tar archive")
    with open(path, "rb") as file:
        if not torch.serialization._is_zipfile(file):
            return False
        with torch.serialization._open_zipfile_reader(file) as archive:
            if torch.serialization._is_torchscript_zip(archive):
                raise UserError(f"{path}: not a checkpoint: a TorchScript archive")
    # torch.save stores records as they are; a compressed one can be a thousand times its size.
    with zipfile.ZipFile(path) as records:
        if any(record.compress_type != zipfile.ZIP_STORED for record in records.infolist()):
            raise UserError(f"{path}: not read: it has compressed records, which torch does not write; repack it")
    return True


def _read_safetensors(path: Path) -> dict[str, Any]:
    """The tensors, and what the header of a file of ours has: the model's `config`, and facts about its `training`."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        content: dict[str, Any] = dict(load_file(path))
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: truncated or not a safetensors file: {_first_line(error)}") from error
    return {**content, **{key: value for key in ("config", "training") if (value := _parsed(header.get(key)))}}


def _parsed(text: str | None) -> dict[str, Any] | None:
    """A mapping as JSON; None if there is none, or if a header's entry is another program's idea."""
    try:
        value = json.loads(text or "null")
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _read_shards(index: Path) -> dict[str, Any]:
    """The tensors of all the safetensors files that an index names; they lie beside it."""
    try:
        shards: Any = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(shards.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: not an index of sharded safetensors: it has no weight_map") from error
    content: dict[str, Any] = {}
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{index}: it names '{name}', which is not a .safetensors file beside it")
        content |= read_checkpoint(index.with_name(name))
    if missing := [key for key in shards if key not in content]:
        raise UserError(f"{index}: {len(missing)} tensors are not in the files that it names, first '{missing[0]}'")
    return content


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def state_dict_of(content: Mapping[str, Any], path: str | Path) -> dict[str, Tensor]:
    """The named tensors of a read checkpoint, with or without the `state_dict` around them.

    Raises:
        UserError: there are none.
    """
    weights = content.get("state_dict", content)
    tensors = {k: v for k, v in weights.items() if isinstance(v, Tensor)} if isinstance(weights, Mapping) else {}
    if not tensors:
        raise UserError(f"{path}: no weights in it; its keys are {', '.join(map(str, list(content)[:5])) or 'none'}")
    return tensors


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


def describe(state: Mapping[str, Tensor]) -> str:
    """What a checkpoint holds, for a report: the family, how many tensors of which types, averages or not."""
    from ldm.families import recognise

    family = recognise(state)
    types = sorted({str(value.dtype).removeprefix("torch.") for value in state.values() if value.is_floating_point()})
    averages = ", averaged weights beside the trained ones" if has_averages(state) else ""
    return f"{family.name if family else 'weights'}, {len(state)} tensors ({', '.join(types)}){averages}"


# Loading


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
    from ldm.families import recognise

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


# Writing


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in nested containers."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(map(tensor_bytes, value.values()))
    return sum(map(tensor_bytes, value)) if isinstance(value, (list, tuple)) else 0


def write_atomically(path: str | Path, write: Callable[[Path], object], expected_bytes: int = 0) -> None:
    """Let `write` make a temporary file beside `path`, then rename it: there is never half a file at `path`.

    Raises:
        UserError: the disk lacks `expected_bytes`, or writing failed; what was at `path` is still there.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: not written: {_first_line(error)}") from error
    free = shutil.disk_usage(path.parent).free
    if expected_bytes > free:
        raise UserError(
            f"{path}: not written: it needs {expected_bytes / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free; "
            "make room or choose another --logdir"
        )
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        give_usual_permissions(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise UserError(f"{path}: not written: {_first_line(error)}") from error
    finally:
        temporary.unlink(missing_ok=True)


def give_usual_permissions(path: Path) -> None:
    """Those of any new file: safetensors makes files that nobody else may read."""
    os.umask(umask := os.umask(0))
    path.chmod(0o666 & ~umask)


def save_checkpoint(content: Mapping[str, Any], path: str | Path) -> None:
    """Write a `.ckpt` atomically; raises as `write_atomically` does."""
    write_atomically(path, lambda temporary: torch.save(dict(content), temporary), tensor_bytes(content))
