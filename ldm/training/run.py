"""The run folder: `{logdir}/{data folder}{time}_{name}{postfix}` with `configs/`, `checkpoints/`, `images/`."""

from __future__ import annotations

import argparse
import datetime
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ldm.distributed import agreed
from ldm.errors import UserError

# Lightning starts the other ranks of a run as copies of this process: they inherit the time from it. Those that
# torchrun or SLURM starts ask the first one.
STAMP_VARIABLE = "DREAMBOOTH_RUN_STAMP"


LONGEST_NAME = 255 - 40  # of any file, without `-fp16.safetensors` and the like behind it
LONGEST_STAMP = "2026-01-02T03-04-05_00"


@dataclass(frozen=True)
class Run:
    """Where a run's files are, and the checkpoint that it goes on from."""

    folder: Path
    stamp: str
    resume_from: Path | None = None

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
        """The configs of earlier starts of this run, oldest first."""
        return sorted(self.configs.glob("*.yaml"))


def time_stamp(taken: Callable[[str], bool]) -> str:
    """The time of the run's start, the same for all of its processes, made different where it is `taken`."""
    if STAMP_VARIABLE not in os.environ:
        os.environ[STAMP_VARIABLE] = agreed(lambda: _new_stamp(taken))
    return os.environ[STAMP_VARIABLE]


def _new_stamp(taken: Callable[[str], bool]) -> str:
    now = datetime.datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    candidates = (now if number == 0 else f"{now}_{number}" for number in itertools.count())
    return next(stamp for stamp in candidates if not taken(stamp))


def forget_stamp() -> None:
    """End what `time_stamp` began, so that the next run in this process has a time of its own."""
    os.environ.pop(STAMP_VARIABLE, None)


def new_run(args: argparse.Namespace) -> Run:
    """The folder that the flags name for a new run; it is not made yet."""
    parent = Path(args.project or args.logdir or "logs")
    data = Path(args.data_root).resolve().name if args.datadir_in_name is not False and args.data_root else ""
    name = args.name or (Path(args.base[0]).stem if args.base else "run")

    def folder(stamp: str) -> Path:
        return parent / f"{data}{stamp}_{name}{args.postfix}"

    _check_length(folder(LONGEST_STAMP).relative_to(parent))
    stamp = time_stamp(lambda stamp: folder(stamp).exists())
    return Run(folder(stamp), stamp)


def _check_length(name: Path) -> None:
    """Raise a `UserError` if a run's name is too long for a file system, with what files add that have it in theirs."""
    for part in name.parts:
        length = len(os.fsencode(part))
        if length > LONGEST_NAME:
            raise UserError(
                f"--name, --postfix and --data_root give a run folder whose name has {length} bytes, of {LONGEST_NAME} "
                f"that it may have ({part[:60]}...): give a shorter --name, or --datadir_in_name false"
            )


def resumed_run(resume: str) -> Run:
    """The run of a folder, or of a `.ckpt` in its `checkpoints/`.

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
    stamp = time_stamp(lambda stamp: (folder / "configs" / f"{stamp}-project.yaml").exists())
    run = Run(folder, stamp, checkpoint)
    if not run.saved_configs():
        raise UserError(f"--resume {resume}: no configs in {run.configs}: give the run's folder, or start with --base")
    for place in ("checkpoints", "configs", "csv/*"):
        for unfinished in run.folder.glob(f"{place}/.*.tmp"):  # of a save that a kill ended
            unfinished.unlink(missing_ok=True)
    return run
