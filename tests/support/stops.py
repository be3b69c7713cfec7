"""Signals, errors and full disks at a chosen place of a training, which forked starts do to
themselves.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

STOP = "TEST_STOP"  # `place/what/rank`
BATCHES = 5  # optimizer steps before what happens in the middle of training
SAVED = 4  # the step of the checkpoint in whose middle it happens
PLACES = ("start", "class images", "latents", "training", "checkpoint", "sampling", "export")
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGKILL")
KINDS = (*SIGNALS, "exception", "disk full")


def armed() -> ExitStack:
    """Return a context in which what the variable TEST_STOP asks for happens once."""
    stack = ExitStack()
    place, _, rest = os.environ.get(STOP, "").partition("/")
    what, _, rank = rest.partition("/")
    mine = os.environ.get("LOCAL_RANK", "0") == (rank or "0")
    if place and mine:
        for patch in _patches(place, _once(lambda: _happen(what))):
            stack.enter_context(patch)
    return stack


def _once(act: Callable[[], None]) -> Callable[[], None]:
    left = [act]
    return lambda: left.pop()() if left else None


def _happen(what: str) -> None:
    if what.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, what))
    elif what == "exception":
        raise RuntimeError("broken on purpose")
    else:
        shutil.disk_usage = lambda path: SimpleNamespace(free=0)  # type: ignore[assignment]
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _patches(place: str, act: Callable[[], None]) -> Iterator[Any]:
    """Yield the patches that call `act` in the middle of a stage."""
    from ldm.callbacks import panel
    from ldm.checkpoints import headers
    from ldm.data import latents
    from ldm.models.diffusion.ddpm import LatentDiffusion
    from ldm.sampling import series
    from ldm.training import train

    if place == "start":
        yield _before(train, "build_model", act)
    elif place == "class images":
        yield _after(series, "save_png", act)
    elif place == "latents":
        yield _after(latents, "_encode", act)
    elif place == "training":
        yield _before(
            LatentDiffusion, "training_step", act, when=lambda model: model.global_step == BATCHES
        )
    elif place == "checkpoint":
        yield _in_the_middle_of_a_checkpoint(act)
    elif place == "sampling":
        yield _before(panel, "text_to_image", act, when=lambda model: model.global_step > 0)
    elif place == "export":
        yield _in_the_middle_of_an_export(headers, act)


def _before(
    where: Any, name: str, act: Callable[[], None], when: Callable[[Any], bool] = lambda _: True
) -> Any:
    original = getattr(where, name)

    def changed(*args: Any, **kwargs: Any) -> Any:
        if when(args[0]):
            act()
        return original(*args, **kwargs)

    return mock.patch.object(where, name, changed)


def _after(where: Any, name: str, act: Callable[[], None]) -> Any:
    original = getattr(where, name)

    def changed(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        act()
        return result

    return mock.patch.object(where, name, changed)


def _in_the_middle_of_a_checkpoint(act: Callable[[], None]) -> Any:
    save = torch.save

    def changed(content: Any, path: Any) -> None:
        if content["global_step"] == SAVED:
            Path(path).write_bytes(b"half of it")
            act()
        save(content, path)

    return mock.patch.object(torch, "save", changed)


def _in_the_middle_of_an_export(headers: Any, act: Callable[[], None]) -> Any:
    save = headers.save_file

    def changed(state: Any, path: Any, **kwargs: Any) -> None:
        Path(path).write_bytes(b"half of it")
        act()
        save(state, path, **kwargs)

    return mock.patch.object(headers, "save_file", changed)
