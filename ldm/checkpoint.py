"""Checkpoints: read without running their code, load with a report, write without losing what was there."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import shutil
import tarfile
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.util import instantiate_from_config

log = logging.getLogger(__name__)

# What a model can do without: made anew with the model, or only for sampling.
OPTIONAL_SUFFIXES = ("position_ids",)
OPTIONAL_PREFIXES = ("model_ema.",)


# Reading


class Stub:
    """Stands for an object of a class that a checkpoint names and this reader does not build.

    It keeps what the pickle says about it in `args` and `state`, and never runs anything.
    """

    args: tuple[Any, ...]
    items: list[Any]
    state: Any

    def __new__(cls, *args: Any, **kwargs: Any) -> Stub:  # pickles make objects without `__init__`
        self = super().__new__(cls)
        self.args, self.items, self.state = args, [], {}
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def append(self, value: Any) -> None:
        self.items.append(value)

    def extend(self, values: Iterable[Any]) -> None:
        self.items.extend(values)

    add = append

    def __hash__(self) -> int:
        return id(self)


_ALLOWED_BUILTINS = frozenset({"set", "frozenset", "dict", "list", "tuple", "int", "float", "bool", "str", "bytes",
                               "bytearray", "complex"})  # fmt: skip
_ALLOWED_GLOBALS = frozenset(
    {
        ("collections", "OrderedDict"),
        ("_codecs", "encode"),  # how old protocols write bytes
        ("torch._utils", "_rebuild_tensor"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch._utils", "_rebuild_tensor_v3"),
        ("torch._utils", "_rebuild_parameter"),
        ("torch", "Size"),
        ("torch", "device"),
        ("torch.serialization", "_get_layout"),
    }
)


def _guarded(value: Any) -> Any:
    """A function that is the pickle's own: pickles can set attributes of whatever they name."""
    return (lambda *args: value(*args)) if isinstance(value, types.FunctionType) else value


class _SafeUnpickler(pickle.Unpickler):
    """Builds tensors and plain containers; every other class becomes a `Stub`, without being imported."""

    @property
    def persistent_load(self) -> Callable[[Any], Any]:
        return self._persistent_load

    @persistent_load.setter
    def persistent_load(self, load_storage: Callable[[Any], Any]) -> None:  # torch does
        self._load_storage = load_storage

    def _persistent_load(self, saved_id: Any) -> Any:
        # Old files keep classes with their source, of which torch would write a comparison to a file.
        if isinstance(saved_id, tuple) and saved_id[0] in ("module", b"module"):
            return saved_id[1]
        return self._load_storage(saved_id)

    def find_class(self, module: str, name: str) -> Any:
        if module in ("builtins", "__builtin__") and name in _ALLOWED_BUILTINS:
            return super().find_class("builtins", name)
        if (module, name) in _ALLOWED_GLOBALS:
            return _guarded(super().find_class(module, name))
        if module == "torch" and isinstance(value := vars(torch).get(name), torch.dtype):
            return value
        if module in ("torch", "torch.storage") and name == "UntypedStorage":
            return types.SimpleNamespace(dtype=torch.uint8)  # all that torch asks it for; it resolves the others
        return type(name, (Stub,), {"__module__": f"stub.{module}"})


def _load_pickle(file: Any, **kwargs: Any) -> Any:
    return _SafeUnpickler(file, **kwargs).load()


# torch.load takes a module that offers these names.
_SAFE_PICKLE = types.SimpleNamespace(
    __name__="ldm.checkpoint", Unpickler=_SafeUnpickler, load=_load_pickle, loads=lambda b: _load_pickle(io.BytesIO(b))
)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Everything a `.ckpt`, `.pt`, `.bin` or `.safetensors` file holds, on the CPU, memory-mapped where possible.

    Pickled classes other than tensors and plain containers come back as `Stub`s; no code of the file runs.

    Raises:
        UserError: no such file, or one that is truncated or not a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        content = torch.load(
            path, map_location="cpu", mmap=_is_plain_zip(path), weights_only=False, pickle_module=_SAFE_PICKLE
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
        UserError: it would do more than unpickle: run TorchScript, or extract a tar archive.
    """
    if tarfile.is_tarfile(path):
        raise UserError(f"{path}: not a checkpoint: a tar archive")
    with open(path, "rb") as file:
        if not torch.serialization._is_zipfile(file):
            return False
        with torch.serialization._open_zipfile_reader(file) as archive:
            if torch.serialization._is_torchscript_zip(archive):
                raise UserError(f"{path}: not a checkpoint: a TorchScript archive")
    return True


def _read_safetensors(path: Path) -> dict[str, Any]:
    """The tensors, and the `config` that the header of a file of ours has."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        content: dict[str, Any] = dict(load_file(path))
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: truncated or not a safetensors file: {_first_line(error)}") from error
    try:
        config = json.loads(header.get("config", "null"))
    except ValueError:  # another program's idea of a config
        config = None
    return {**content, "config": config} if isinstance(config, dict) and "model" in config else content


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


def ema_weights(state: Mapping[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """A checkpoint's weights with the averages (`model_ema.*`) in the places of what they average.

    Raises:
        UserError: it has no averages.
    """
    averages = {key.removeprefix("model_ema."): value for key, value in state.items() if key.startswith("model_ema.")}
    shadowed = {key: key.removeprefix("model.").replace(".", "") for key in state if key.startswith("model.")}
    found = {key: averages[name] for key, name in shadowed.items() if name in averages}
    if not found:
        raise UserError(f"{path}: no averaged weights (model_ema.*) in it")
    return {**{key: value for key, value in state.items() if not key.startswith("model_ema.")}, **found}


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


def instantiate_filled(
    config: Mapping[str, Any], state: Mapping[str, Tensor], path: str | Path, where: str = "model"
) -> tuple[Any, LoadReport]:
    """The model of a config with a checkpoint's tensors in it; raises as `compare` does.

    No weight is initialised that the checkpoint then overwrites.
    """
    config = without_initial_weights(config)
    with EmptyInit():
        model = instantiate_from_config(config, where)
    if compare(model, state, path).missing:
        model = instantiate_from_config(config, where)
    report = load_state(model, state, path)
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
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise UserError(f"{path}: not written: {_first_line(error)}") from error
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(content: Mapping[str, Any], path: str | Path) -> None:
    """Write a `.ckpt` atomically; raises as `write_atomically` does."""
    write_atomically(path, lambda temporary: torch.save(dict(content), temporary), tensor_bytes(content))
