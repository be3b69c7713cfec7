"""How the command-line entry points end: one line for what a user can mend, and a status that is
not 0.
"""

from __future__ import annotations

import errno
import logging
import os
import runpy
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

from ldm import signals
from ldm.config import PROJECT
from ldm.distributed import has_told_failure, is_first
from ldm.errors import UserError
from ldm.host import is_out_of_memory

log = logging.getLogger(__name__)

LESS_MEMORY = "close other programs, or take a machine with more of it"
INTERRUPTED = 128 + signal.SIGINT  # the exit status of a program that Ctrl-C ended

OF_THE_DISK = {
    errno.ENOSPC: "make room there, or write elsewhere",
    errno.EDQUOT: "make room there, or write elsewhere",
    errno.EFBIG: "files of this size are not allowed there; write elsewhere",
    errno.EROFS: "write elsewhere",
    errno.EACCES: "change its permissions, or use another",
    errno.EPERM: "change its permissions, or use another",
    errno.ENOTDIR: "a file stands where a folder is needed",
    errno.EEXIST: "a file stands where a folder is needed",
    errno.ENAMETOOLONG: "give a shorter name",
}


def disk_text(error: OSError) -> str:
    """Return one line for a disk that refuses, with the way out, or nothing for other errors."""
    if error.errno not in OF_THE_DISK:
        return ""
    return f"{error.filename or 'writing'}: {error.strerror}: {OF_THE_DISK[error.errno]}"


def check_writable(folder: Path, instead: str) -> None:
    """Raise a `UserError` if a folder cannot be made, or nothing can be written into it.

    It is tried in the nearest folder that there is, and leaves nothing behind.

    Args:
        instead: what to do then.
    """
    if folder.parts[:1] == ("~",):
        # A shell replaces the sign in `--outdir ~/x`, but in `--outdir=~/x` it leaves it.
        raise UserError(f"{folder}: '~' is not replaced here; write {folder.expanduser()}")
    place = folder.absolute()
    try:
        while not place.exists():
            if place.is_symlink():
                raise UserError(
                    f"{place}: a link to {place.readlink()}, which is not there; {instead}"
                )
            place = place.parent
        if not place.is_dir():
            raise UserError(f"{place}: a file stands where a folder is needed; {instead}")
        os.rmdir(tempfile.mkdtemp(prefix=".try-", dir=place))
    except OSError as error:  # no right to write, a read-only disk, a folder of the system's own
        raise UserError(f"{folder}: cannot write there: {error.strerror}; {instead}") from error


def exit_status(
    command: Callable[[], int | None],
    debug: Callable[[], bool] = lambda: False,
    less_memory: str = LESS_MEMORY,
) -> int:
    """Run a command and return its exit status.

    A `UserError`, a disk that refuses or too little memory is one line and status 1. A stop signal
    is one line and 128 plus its number: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP. Other
    errors, and all of them while `debug()`, keep their traceback.

    Args:
        less_memory: how the user makes the command need less.
    """
    with signals.handled():
        try:
            signals.act_on_held()
            return command() or 0
        except (signals.Interrupted, KeyboardInterrupt) as stop:
            signals.be_deaf()
            if debug():
                raise
            if not is_first():  # Lightning kills the first process when another's status is not 0
                return 0
            log.error("%s", stop if isinstance(stop, signals.Interrupted) else "interrupted")
            return stop.status if isinstance(stop, signals.Interrupted) else INTERRUPTED
        except UserError as error:
            if debug():
                raise
            log.error("error: %s", error)
        except OSError as error:
            text = disk_text(error)
            if debug() or not text:
                raise
            log.error("error: %s", text)
        except Exception as error:
            if is_out_of_memory(error) and not debug():
                problem = (str(error).strip() or type(error).__name__).splitlines()[0]
                log.error("error: out of memory: %s; to need less: %s", problem, less_memory)
            elif has_told_failure():
                log.exception("error:")
            else:
                raise
        return 0 if has_told_failure() else 1


# What an installed package has as commands: the files that a checkout runs with `python`.


def train() -> None:
    """Run `main.py`."""
    _run("main.py")


def txt2img() -> None:
    """Run `scripts/txt2img.py`."""
    _run("scripts/txt2img.py")


def class_images() -> None:
    """Run `scripts/class_images.py`."""
    _run("scripts/class_images.py")


def convert() -> None:
    """Run `scripts/convert.py`."""
    _run("scripts/convert.py")


def _run(name: str) -> None:
    runpy.run_path(str(PROJECT / name), run_name="__main__")
