"""How the command-line entry points end: what a user can mend is one line, and a status that is not 0."""

from __future__ import annotations

import errno
import logging
import runpy
import signal
from collections.abc import Callable

from ldm.config import PROJECT
from ldm.errors import UserError

log = logging.getLogger(__name__)

INTERRUPTED = 128 + signal.SIGINT  # the exit status of a program that Ctrl-C ended

OF_THE_DISK = {
    errno.ENOSPC: "make room there, or write elsewhere",
    errno.EDQUOT: "make room there, or write elsewhere",
    errno.EROFS: "write elsewhere",
    errno.EACCES: "change its permissions, or use another",
    errno.EPERM: "change its permissions, or use another",
    errno.ENOTDIR: "a file stands where a folder is needed",
    errno.EEXIST: "a file stands where a folder is needed",
}


def exit_status(command: Callable[[], int | None], debug: Callable[[], bool] = lambda: False) -> int:
    """Run a command; its status, or 1 with one line for a `UserError` or a disk that refuses, 130 for Ctrl-C.

    Other errors, and all while `debug()`, keep their traceback.
    """
    try:
        return command() or 0
    except KeyboardInterrupt:
        if debug():
            raise
        log.error("interrupted")
        return INTERRUPTED
    except UserError as error:
        if debug():
            raise
        log.error("error: %s", error)
    except OSError as error:
        if debug() or error.errno not in OF_THE_DISK:
            raise
        log.error("error: %s: %s: %s", error.filename or "writing", error.strerror, OF_THE_DISK[error.errno])
    return 1


# What an installed package has as commands: the files that a checkout runs with `python`.


def train() -> None:
    """Run `main.py`."""
    _run("main.py")


def txt2img() -> None:
    """Run `scripts/stable_txt2img.py`."""
    _run("scripts/stable_txt2img.py")


def convert() -> None:
    """Run `scripts/convert.py`."""
    _run("scripts/convert.py")


def _run(name: str) -> None:
    runpy.run_path(str(PROJECT / name), run_name="__main__")
