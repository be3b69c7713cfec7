"""Files that are written whole or not at all."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from ldm.errors import UserError

log = logging.getLogger(__name__)

LOCK = ".lock"  # a hidden file, for as long as a process works on a folder alone


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def tensor_bytes(value: object) -> int:
    """Count the bytes of all tensors in nested containers."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(map(tensor_bytes, value.values()))
    return sum(map(tensor_bytes, value)) if isinstance(value, (list, tuple)) else 0


def size_text(size: float) -> str:
    """Return a number of bytes in words that a person reads: `4.27 GB`, `12.3 MB`, `401 bytes`."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size:.0f} bytes"


def write_atomically(
    path: str | Path,
    write: Callable[[Path], object],
    expected_bytes: int = 0,
    may_replace: bool = True,
) -> None:
    """Let `write` make a temporary file beside `path`, then rename it: there is never half a file
    at `path`.

    Raises:
        FileExistsError: there is a file at `path`, and not `may_replace`.
        UserError: the disk lacks `expected_bytes`, or writing failed; what was at `path` is still
            there.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: not written: {first_line(error)}") from error
    free = shutil.disk_usage(path.parent).free
    if expected_bytes > free:
        raise UserError(
            f"{path}: not written: it needs {size_text(expected_bytes)} and the disk has "
            f"{size_text(free)} free; make room or choose another place"
        )
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        give_usual_permissions(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if may_replace:
            os.replace(temporary, path)
        else:
            _rename_to_new(temporary, path)
    except FileExistsError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch reports a full disk as a RuntimeError, safetensors as an error of its own.
        raise UserError(f"{path}: not written: {first_line(error)}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _rename_to_new(temporary: Path, path: Path) -> None:
    """Give a file its name, unless another file has that already, which raises."""
    try:
        os.link(temporary, path)  # the only way that no other process can come between
    except FileExistsError:
        raise
    except OSError as error:  # not every file system has links
        if path.exists():
            raise FileExistsError(path) from error
        os.replace(temporary, path)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Let one process at a time work on a folder, which is made; the others wait for its end,
    whatever ends it. A folder that is still empty then goes again.

    Where the system or the file system has no locks, nobody waits.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with _locked_file(folder / LOCK) as file:
        try:
            yield
        finally:
            # While it is locked: who waits for it sees that it is gone, and takes a new one.
            with suppress(OSError):
                file.unlink()
            for path in made:
                with suppress(OSError):  # something is in it
                    path.rmdir()


@contextmanager
def _locked_file(path: Path) -> Iterator[Path]:
    """Hold the system's lock on the file that has this name now."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # another process has just removed the folder
            continue
        try:
            _wait_for(descriptor, path)
            if _is_at(descriptor, path):
                with suppress(OSError):
                    os.write(descriptor, f"{os.getpid()}\n".encode())  # for people
                yield path
                return
        finally:
            os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Tell whether an open file is the one that has this name now."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _wait_for(descriptor: int, path: Path) -> None:
    """Take the system's lock on an open file, when whoever has it is done."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.info("%s: another process works there: waiting for it", path.parent)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:  # a file system without locks
        pass


def give_usual_permissions(path: Path) -> None:
    """Give a file the permissions of any new one.

    Without this, nobody else may read a file of safetensors.
    """
    # The mask can only be read by setting it.
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def save_checkpoint(content: Mapping[str, object], path: str | Path) -> None:
    """Write a `.ckpt` atomically; raises as `write_atomically` does."""
    write_atomically(
        path, lambda temporary: torch.save(dict(content), temporary), tensor_bytes(content)
    )
