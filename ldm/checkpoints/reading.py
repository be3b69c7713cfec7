"""Checkpoint files, read by what is in them rather than by their name; no code of theirs runs."""

from __future__ import annotations

import json
import logging
import re
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoints.layouts import unwrapped
from ldm.checkpoints.other_files import ARCHIVE, WEIGHT_SUFFIXES, of_bytes
from ldm.checkpoints.other_folders import of_folder
from ldm.checkpoints.unpickle import SAFE_PICKLE, is_module
from ldm.errors import UserError, nearest
from ldm.files import first_line

log = logging.getLogger(__name__)

SHARD_INDEX = ".safetensors.index.json"
# As diffusers and transformers name them: `model.safetensors.index.json`,
# `model.safetensors.index.fp16.json`.
_INDEX_NAME = re.compile(r"\.(safetensors|bin)\.index(\.[\w-]+)?\.json$")
_SHARD_NAME = re.compile(r"-\d{5}-of-(\d{5})\.")

ZIP, PICKLE = b"PK\x03\x04", b"\x80"
CUT_OFF = "it ends too early: download it again"


def read_checkpoint(path: str | Path, mapped: bool = True) -> dict[str, Any]:
    """Read everything that a file of weights holds, on the CPU.

    The content says what it is, not the name: safetensors, or a pickle of `torch.save` (`.ckpt`,
    `.pt`, `.pth`, `.bin`). Of a sharded one the path is that of its index. Pickled classes other
    than tensors and plain containers come back as `Stub`s; no code of the file runs.

    Args:
        mapped: leave the tensors in the file and map it, where that is possible. It stays in memory
            as a whole while one of its tensors is used; without, each tensor is freed alone.

    Raises:
        UserError: no such file, or one that is truncated or not a checkpoint; the message says what
            it is.
    """
    path = Path(path)
    _refuse_what_is_no_file(path)
    try:
        if is_shard_index(path):
            return _read_shards(path, mapped)
        if _is_safetensors(path):
            return _read_safetensors(path, mapped)
        if what := of_bytes(path):
            raise UserError(f"{path}: {what}")
        return _read_pickle(path, mapped)
    except OSError as error:
        raise UserError(f"{path}: not read: {first_line(error)}") from error


def _refuse_what_is_no_file(path: Path) -> None:
    """Raise a `UserError` that says what is at a path, or what is nearest to it, if that is no
    file.
    """
    if path.is_file():
        return
    if path.is_dir():
        what = of_folder(path) or "a diffusers pipeline, where a file is needed"
        raise UserError(f"{path}: no such checkpoint: {what}")
    if path.is_symlink():
        raise UserError(
            f"{path}: no such checkpoint: a link to {path.readlink()}, which is not there"
        )
    if path.exists():
        raise UserError(f"{path}: no such checkpoint: neither a file nor a folder")
    beside = [other.name for other in path.parent.glob("*") if other.suffix in WEIGHT_SUFFIXES]
    raise UserError(f"{path}: no such checkpoint{nearest(path.name, beside)}")


# ---- safetensors ---------------------------------------------------------------------------------


def _is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do: the length of a JSON header in 8 bytes, then the
    header.
    """
    with open(path, "rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32


def _read_safetensors(path: Path, mapped: bool) -> dict[str, Any]:
    """Read the tensors, and what the header of a file of ours has: the model's `config`, and its
    `training`.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    if path.suffix not in ("", ".safetensors"):
        log.info("%s: safetensors, in spite of its name", path)
    try:
        content: dict[str, Any] = dict(load_file(path))
        if not mapped:
            content = _in_memory(path, content)
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        too_short = any(word in str(error).lower() for word in ("buffer", "incomplete"))
        detail = CUT_OFF if too_short else first_line(error)
        raise UserError(f"{path}: truncated or not a safetensors file: {detail}") from error
    for key in ("config", "training"):
        if value := _parsed(header.get(key)):
            content[key] = value
    return content


def _in_memory(path: Path, mapped: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the tensors of a mapped safetensors file, each in memory of its own."""
    found: dict[str, Any] = {}
    with open(path, "rb") as file:
        begin = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(begin - 8))
        for name, tensor in mapped.items():
            found[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
            file.seek(begin + header[name]["data_offsets"][0])
            file.readinto(found[name].view(-1).view(torch.uint8).numpy())
    return found


def _parsed(text: str | None) -> dict[str, Any] | None:
    """Return a mapping as JSON; None if there is none, or if a header's entry is another program's
    idea.
    """
    try:
        value = json.loads(text or "null")
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


# ---- pickles -------------------------------------------------------------------------------------


def _read_pickle(path: Path, mapped: bool) -> dict[str, Any]:
    """Read a file that `torch.save` wrote, in either of its formats."""
    options: dict[str, Any] = {
        "map_location": "cpu",
        "weights_only": False,
        "pickle_module": SAFE_PICKLE,
    }
    try:
        can_be_mapped = mapped and _is_plain_zip(path)
        if path.suffix == ".safetensors":
            # torch goes by this name, so that it gets the open file, which cannot be mapped.
            with open(path, "rb") as file:
                content = torch.load(file, **options)
        else:
            content = torch.load(path, mmap=can_be_mapped, **options)
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can cause any
        kind = "safetensors file" if path.suffix == ".safetensors" else "checkpoint"
        raise UserError(f"{path}: truncated or not a {kind}: {_damage(path, error)}") from error
    if not isinstance(content, Mapping):
        name = type(content).__name__
        way_out = ": save its state_dict() instead" if is_module(content) else ""
        raise UserError(f"{path}: not a checkpoint: it holds a {name}, not a mapping{way_out}")
    if path.suffix == ".safetensors":
        log.info("%s: a pickle of torch.save, in spite of its name", path)
    return dict(content)


def _damage(path: Path, error: Exception) -> str:
    """Return what is wrong with a file that could not be read, in words that a user can act on."""
    with open(path, "rb") as file:
        begins = file.read(4)
    if begins.startswith(ZIP[:2]):
        readable = zipfile.is_zipfile(path)
        return first_line(error) if readable else CUT_OFF
    if not begins.startswith(PICKLE):
        return "it begins like no file of weights: check what it is, or download it again"
    if (
        isinstance(error, EOFError)
        or "eof" in str(error).lower()
        or "ran out of input" in str(error).lower()
    ):
        return CUT_OFF
    if "Invalid magic number" in str(error):
        return "a pickle that torch.save did not write"
    return first_line(error)


def _is_plain_zip(path: Path) -> bool:
    """Whether torch will read the file as a zip archive rather than in its format before that.

    Raises:
        UserError: it would do more than unpickle: run TorchScript, extract a tar archive, or
            inflate records.
    """
    if tarfile.is_tarfile(path):
        raise UserError(f"{path}: not a checkpoint: a tar {ARCHIVE}")
    with open(path, "rb") as file:
        if not torch.serialization._is_zipfile(file):
            return False
        with torch.serialization._open_zipfile_reader(file) as archive:
            if torch.serialization._is_torchscript_zip(archive):
                raise UserError(
                    f"{path}: not a checkpoint: a TorchScript archive, whose code is not run: "
                    "give the weights that "
                    "it was made of"
                )
    # torch.save stores records as they are; a compressed one can be a thousand times its size.
    with zipfile.ZipFile(path) as records:
        if any(record.compress_type != zipfile.ZIP_STORED for record in records.infolist()):
            raise UserError(
                f"{path}: not read: it has compressed records, which torch does not write; "
                "repack it"
            )
    return True


# ---- sharded files -------------------------------------------------------------------------------


def is_shard_index(path: Path) -> bool:
    """Whether a file's name is that of an index, which names the files that the weights are in."""
    return _INDEX_NAME.search(path.name) is not None


def is_shard(path: Path) -> bool:
    """Whether a file's name is that of one of several files that hold the weights together."""
    return _SHARD_NAME.search(path.name) is not None


def refuse_single_shard(path: Path) -> None:
    """Raise a `UserError` for one file of several, naming the index that stands for all of them."""
    found = _SHARD_NAME.search(path.name)
    if found is None or int(found[1]) < 2:
        return
    indices = [other for other in sorted(path.parent.glob("*.json")) if is_shard_index(other)]
    way_out = (
        f"give their index, {indices[0]}"
        if indices
        else "their index (*.index.json) is not beside it"
    )
    raise UserError(
        f"{path}: one of {int(found[1])} files that hold the weights together: {way_out}"
    )


def _read_shards(index: Path, mapped: bool) -> dict[str, Any]:
    """Read the tensors of all the files that an index names; they lie beside it."""
    match = _INDEX_NAME.search(index.name)
    assert match is not None
    suffix = f".{match[1]}"
    try:
        shards: Any = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(shards.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{index}: not an index of sharded {match[1]}: it has no weight_map"
        ) from error
    content: dict[str, Any] = {}
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(suffix):
            raise UserError(f"{index}: it names '{name}', which is not a {suffix} file beside it")
        shard = index.with_name(name)
        content |= state_dict_of(read_checkpoint(shard, mapped), shard)
    missing = [key for key in shards if key not in content]
    if missing:
        raise UserError(
            f"{index}: {len(missing)} tensors are not in the files that it names, first "
            f"'{missing[0]}'"
        )
    return content


# ---- the weights in it ---------------------------------------------------------------------------


def state_dict_of(content: Mapping[str, Any], path: str | Path) -> dict[str, Tensor]:
    """Return the named tensors of a read checkpoint, without the mappings around them
    (`state_dict`, `model`, ...).

    Raises:
        UserError: there are none.
    """
    weights = unwrapped(content)
    tensors = {
        key: value
        for key, value in weights.items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }
    if not tensors:
        names = ", ".join(map(str, list(content)[:5])) or "none"
        raise UserError(f"{path}: no weights in it; its keys are {names}")
    return tensors
