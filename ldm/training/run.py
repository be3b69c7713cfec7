"""The run folder: `{logdir}/{data folder}{time}_{name}{postfix}` with `configs/`, `checkpoints/`,
`images/`.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ldm import signals
from ldm.commands import check_writable
from ldm.distributed import agreed, is_first
from ldm.errors import UserError

# Lightning starts the other ranks of a run as copies of this process: they inherit the time from
# it. Those that torchrun or SLURM starts ask the first one.
STAMP_VARIABLE = "DREAMBOOTH_RUN_STAMP"


LONGEST_NAME = 255 - 40  # of any file, without `-fp16.safetensors` and the like behind it
LONGEST_STAMP = "2026-01-02T03-04-05_00"


@dataclass
class Run:
    """Where a run's files are, and the checkpoint that it goes on from.

    Attributes:
        trained: whether this start of the run has made a step.
        made: the folders that were made to reserve the run's own, the outermost first.
    """

    folder: Path
    stamp: str
    resume_from: Path | None = None
    trained: bool = False
    made: tuple[Path, ...] = ()

    @property
    def configs(self) -> Path:
        return self.folder / "configs"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def images(self) -> Path:
        return self.folder / "images"

    def saved_configs(self) -> list[Path]:
        """Return the configs of earlier starts of this run, oldest first."""
        return sorted(self.configs.glob("*.yaml"))


def time_stamp(claim: Callable[[str], bool]) -> str:
    """Return the time of the run's start, the same for all of its processes.

    Args:
        claim: returns whether the first process may have this one; it is asked until it does.
    """
    if STAMP_VARIABLE not in os.environ:
        os.environ[STAMP_VARIABLE] = agreed(lambda: _new_stamp(claim))
    return os.environ[STAMP_VARIABLE]


def _new_stamp(claim: Callable[[str], bool]) -> str:
    now = datetime.datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    # A run that began in the same second has taken the plain time.
    for number in itertools.count():
        stamp = now if number == 0 else f"{now}_{number}"
        if claim(stamp):
            return stamp
    raise AssertionError("the numbers have no end")


def forget_stamp() -> None:
    """End what `time_stamp` began, so that the next run in this process has a time of its own."""
    os.environ.pop(STAMP_VARIABLE, None)


def new_run(args: argparse.Namespace) -> Run:
    """Make the folder that the flags name for a new run, which no other run has or will have."""
    parent = Path(args.project or args.logdir or "logs")
    data = (
        Path(args.data_root).resolve().name
        if args.datadir_in_name is not False and args.data_root
        else ""
    )
    name = args.name or (Path(args.base[0]).stem if args.base else "run")
    _check_name(name, args.postfix)
    made: list[Path] = []

    def folder(stamp: str) -> Path:
        return parent / f"{data}{stamp}_{name}{args.postfix}"

    _check_length(folder(LONGEST_STAMP).relative_to(parent))
    if is_first():
        check_writable(parent, "choose another --logdir")

    def claim(stamp: str) -> bool:
        made[:] = _make_folder(folder(stamp))
        return bool(made)

    stamp = time_stamp(claim)
    return Run(folder(stamp), stamp, made=tuple(made))


def _make_folder(folder: Path) -> list[Path]:
    """Make a folder that is not there yet; return it behind those that it needed, or nothing."""
    needed = [path for path in reversed(folder.parents) if not path.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir()
    except FileExistsError:
        return []
    return [*needed, folder]


@contextmanager
def held(run: Run) -> Iterator[None]:
    """Keep a run's folder for this command alone, on its first process.

    If the command ends inside by an error or a signal before it has made a step, whatever it has
    written into the folder goes again: it would be an empty run, or a config that was refused and
    that the next start would read.

    Raises:
        UserError: another process is training in this folder.
    """
    if not is_first():
        yield
        return
    before: set[Path] = set()

    def undo() -> None:
        if not run.trained:
            _remove_new(run, before)

    with _locked(run.folder), signals.last_act(undo):
        _remove_unfinished(run)
        before |= set(run.folder.rglob("*"))
        try:
            yield
        except BaseException as error:
            undo()
            if isinstance(error, signals.Interrupted):
                error.advice = error.advice or nothing_saved(run)
            raise


def nothing_saved(run: Run, lost: str = "") -> str:
    """Say how to go on after an end before a step was saved.

    Args:
        lost: which steps were made, and are lost.
    """
    if run.resume_from is None:
        return f"no step is saved yet{lost}: start it again"
    return f"no further step is saved{lost}; go on with: {resume_command(run)}"


def lost_steps(saved: int, made: int) -> str:
    """Return ` (steps 3 to 5 are lost)` for steps behind the saved one; an empty text for none."""
    if made <= saved:
        return ""
    if made == saved + 1:
        return f" (step {made} is lost)"
    return f" (steps {saved + 1} to {made} are lost)"


def resume_command(run: Run) -> str:
    """Return the command that goes on with a run."""
    return shlex.join(["python", "main.py", "-r", relative(run.folder)])


def relative(path: Path) -> str:
    """Return a path as a command in the current folder would name it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _remove_unfinished(run: Run) -> None:
    """Remove what a kill in the middle of a save has left of its file."""
    for place in ("checkpoints", "configs", "csv/*"):
        for unfinished in run.folder.glob(f"{place}/.*.tmp"):
            unfinished.unlink(missing_ok=True)


def _remove_new(run: Run, before: set[Path]) -> None:
    """Remove what came into a run's folder since `before`, and the folder if that was new."""
    for path in sorted(set(run.folder.rglob("*")) - before, reverse=True):  # what is inside first
        is_folder = path.is_dir() and not path.is_symlink()
        with suppress(OSError):
            (path.rmdir if is_folder else path.unlink)()
    folders = run.made if run.made or before else (run.folder,)
    for folder in reversed(folders):
        with suppress(OSError):  # something of others is in it
            folder.rmdir()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the system's lock on a folder, which ends with this process, whatever ends it."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    if not folder.exists():
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise UserError(
            f"{folder}: another process is training in it; wait for its end, or stop it"
        ) from error
    except OSError:  # a file system without locks
        pass
    _locks.add(descriptor)
    try:
        yield
    finally:
        _locks.discard(descriptor)
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # also of copies that a worker still has
        os.close(descriptor)


_locks: set[int] = set()


def _drop_locks() -> None:
    """Release a forked worker's copies of the locks: it may outlive the process that trains."""
    while _locks:
        os.close(_locks.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drop_locks)


def _check_name(name: str, postfix: str) -> None:
    """Raise a `UserError` for a name that says another folder, which is what --logdir is for."""
    for flag, text in (("--name", name), ("--postfix", postfix)):
        if "/" in text or os.sep in text:
            raise UserError(
                f"{flag} {text}: is a path; give a name without slashes, and say with --logdir "
                "where run folders are made"
            )


def _check_length(name: Path) -> None:
    """Raise a `UserError` if a run's name is too long for a file system, with what files add that
    have it in theirs.
    """
    for part in name.parts:
        length = len(os.fsencode(part))
        if length > LONGEST_NAME:
            raise UserError(
                f"--name, --postfix and --data_root give a run folder whose name has {length} "
                f"bytes, of {LONGEST_NAME} "
                f"that it may have ({part[:60]}...): give a shorter --name, or "
                "--datadir_in_name false"
            )


def resumed_run(resume: str) -> Run:
    """Return the run of a folder, or of a `.ckpt` in its `checkpoints/`.

    Raises:
        UserError: there is no such run, or it has no checkpoint or config to go on from.
    """
    path = Path(resume)
    if path.is_dir():
        folder, checkpoint = path, path / "checkpoints" / "last.ckpt"
    elif path.is_file():
        folder, checkpoint = path.resolve().parent.parent, path
    else:
        raise UserError(f"--resume {resume}: there is no such run folder or checkpoint")
    if not checkpoint.is_file():
        others = sorted((folder / "checkpoints").glob("*.ckpt"))
        hint = f"; there is {others[-1]}" if others else ""
        raise UserError(f"--resume {resume}: no checkpoint {checkpoint}{hint}")
    stamp = time_stamp(lambda stamp: not (folder / "configs" / f"{stamp}-project.yaml").exists())
    run = Run(folder, stamp, checkpoint)
    if not run.saved_configs():
        raise UserError(
            f"--resume {resume}: no configs in {run.configs}: give the run's folder, or start "
            "with --base"
        )
    return run
