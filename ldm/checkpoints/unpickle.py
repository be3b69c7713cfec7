"""An unpickler that runs nothing: tensors and plain containers out of any checkpoint, whoever wrote
it.
"""

from __future__ import annotations

import io
import pickle
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch


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

    def __setitem__(self, key: Any, value: object) -> None:
        self.items.append((key, value))

    def append(self, value: object) -> None:
        self.items.append(value)

    def extend(self, values: Iterable[Any]) -> None:
        self.items.extend(values)

    add = append

    def __hash__(self) -> int:
        return id(self)


def is_module(value: object) -> bool:
    """Whether something read is a whole pickled `nn.Module`, of which nothing is built."""
    return isinstance(value, Stub) and isinstance(value.state, dict) and "_modules" in value.state


# Containers and numbers; not those that could be asked for any amount of memory, see `_bytes` and
# `_text`.
_ALLOWED_BUILTINS = frozenset(
    {"set", "frozenset", "dict", "list", "tuple", "int", "float", "bool", "complex"}
)
_ALLOWED_GLOBALS = frozenset(
    {
        ("collections", "OrderedDict"),
        ("torch._utils", "_rebuild_tensor"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch._utils", "_rebuild_tensor_v3"),
        ("torch._utils", "_rebuild_parameter"),
        ("torch", "Size"),
        ("torch", "device"),
        ("torch.serialization", "_get_layout"),
    }
)


def _bytes(*args: Any) -> bytes:
    """Bytes of bytes or text; of a number they would be that many zeros."""
    if any(
        isinstance(arg, (int, Iterable)) and not isinstance(arg, (bytes, bytearray, str))
        for arg in args
    ):
        raise pickle.UnpicklingError("bytes of something else than bytes or text")
    return bytes(*args)


def _text(*args: Any) -> str:
    """Text of text or bytes; that of nested containers can be endless."""
    if args and not isinstance(args[0], (bytes, bytearray, str)):
        raise pickle.UnpicklingError("text of something else than bytes or text")
    return str(*args)


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """How old protocols write bytes."""
    if encoding not in ("latin1", "latin-1", "utf-8"):
        raise pickle.UnpicklingError(f"encoding {encoding!r}")
    return text.encode(encoding)


_REPLACED = {
    ("builtins", "bytes"): _bytes,
    ("builtins", "bytearray"): lambda *args: bytearray(_bytes(*args)),
    ("builtins", "str"): _text,
    ("_codecs", "encode"): _encode,
}


def _guarded(value: object) -> Any:
    """A function that is the pickle's own: pickles can set attributes of whatever they name."""
    if isinstance(value, types.FunctionType):
        return lambda *args: value(*args)
    return value


class SafeUnpickler(pickle.Unpickler):
    """Builds tensors and plain containers; every other class becomes a `Stub`, without being
    imported.
    """

    @property
    def persistent_load(self) -> Callable[[Any], Any]:
        return self._persistent_load

    @persistent_load.setter
    def persistent_load(self, load_storage: Callable[[Any], Any]) -> None:  # torch does
        self._load_storage = load_storage

    def _persistent_load(self, saved_id: Any) -> Any:
        # Old files keep classes with their source, of which torch would write a comparison to a
        # file.
        if isinstance(saved_id, tuple) and saved_id[0] in ("module", b"module"):
            return saved_id[1]
        return self._load_storage(saved_id)

    def find_class(self, module: str, name: str) -> Any:
        if module == "__builtin__":  # as Python 2 and the protocols of its time have it
            module, name = "builtins", {"unicode": "str", "long": "int"}.get(name, name)
        if replaced := _REPLACED.get((module, name)):
            return _guarded(replaced)
        if module == "builtins" and name in _ALLOWED_BUILTINS:
            return super().find_class(module, name)
        if (module, name) in _ALLOWED_GLOBALS:
            return _guarded(super().find_class(module, name))
        if module == "torch" and isinstance(value := vars(torch).get(name), torch.dtype):
            return value
        if module in ("torch", "torch.storage") and name == "UntypedStorage":
            return types.SimpleNamespace(
                dtype=torch.uint8
            )  # all that torch asks it for; it resolves the others
        return type(name, (Stub,), {"__module__": f"stub.{module}"})


def _load_pickle(file: Any, **kwargs: Any) -> Any:
    return SafeUnpickler(file, **kwargs).load()


# torch.load takes a module that offers these names.
SAFE_PICKLE = types.SimpleNamespace(
    __name__="ldm.checkpoints.unpickle",
    Unpickler=SafeUnpickler,
    load=_load_pickle,
    loads=lambda b: _load_pickle(io.BytesIO(b)),
)
