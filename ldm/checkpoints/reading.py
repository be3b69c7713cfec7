"""Checkpoint files, read without running their code."""

from __future__ import annotations

import json
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoints.unpickle import SAFE_PICKLE
from ldm.errors import UserError
from ldm.files import first_line

SHARD_INDEX = ".safetensors.index.json"


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
        raise UserError(f"{path}: truncated or not a checkpoint: {first_line(error)}") from error
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
        raise UserError(f"{path}: truncated or not a safetensors file: {first_line(error)}") from error
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
