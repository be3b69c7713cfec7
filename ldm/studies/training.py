"""Runs of the training command, found again and gone on with after a kill."""

from __future__ import annotations

import functools
import json
import logging
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ldm.config import PROJECT
from ldm.errors import UserError
from ldm.files import write_atomically
from ldm.host import end_with_parent

log = logging.getLogger(__name__)

LOG, FLAGS = "training.log", "flags.json"
LAST = Path("checkpoints/last.ckpt")
TAIL = 300  # letters of an error that are told
STAMP = r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(_\d+)?"  # of a run folder, before its name


def trained(name: str, folder: Path, arguments: Sequence[str], done: Path) -> Path:
    """Return the run folder of a finished training, which is begun or gone on with if need be.

    Args:
        name: of the run; no other one in the folder has it.
        folder: where its run folder is.
        arguments: of the training command for a new run, without its name and place.
        done: a file that says which run is finished.

    Raises:
        UserError: the training ended with an error; what it has saved is still there.
    """
    if done.is_file():
        return folder / done.read_text(encoding="utf-8").strip()
    begun = [run for run in run_folders(folder, name) if (run / LAST).is_file()]
    command = ["-r", str(begun[-1])] if begun else new_run(name, folder, arguments)
    train(command, folder / f"{name}.{LOG}")
    (run, *_) = reversed([run for run in run_folders(folder, name) if (run / LAST).is_file()])
    done.write_text(run.name, encoding="utf-8")
    return run


def settle_flags(outdir: Path, flags: Mapping[str, Sequence[str]]) -> None:
    """Note the flags of a study's parts, or compare them with those that its folder has: a run that
    is gone on with and a score that is not made again would be of those.

    Args:
        flags: of each part, what makes its trainings what they are.

    Raises:
        UserError: a part is there with other flags.
    """
    outdir.mkdir(parents=True, exist_ok=True)
    before: dict[str, list[str]] = {}
    if (outdir / FLAGS).is_file():
        before = json.loads((outdir / FLAGS).read_text(encoding="utf-8"))
    now = {name: list(words) for name, words in flags.items()}
    for name, words in now.items():
        if name in before and before[name] != words:
            changed = [word for word in before[name] if word not in words]
            changed += [word for word in words if word not in before[name]]
            raise UserError(
                f"{outdir}: has '{name}' with other flags ({', '.join(changed)}); "
                "choose another --outdir, or another name for it"
            )
    text = json.dumps({**before, **now}, indent=1)
    write_atomically(outdir / FLAGS, lambda path: path.write_text(text, encoding="utf-8"))


def new_run(name: str, folder: Path, arguments: Sequence[str]) -> list[str]:
    """Return the words of the training command for a new run."""
    return ["-t", "-n", name, "-p", str(folder), "--datadir_in_name", "false", *arguments]


def run_folders(folder: Path, name: str) -> list[Path]:
    """Return the run folders of a name, the oldest first."""
    # The whole name: that of another run may end in it, as "textual_inversion" in "inversion".
    whole = re.compile(f"{STAMP}_{re.escape(name)}")
    found = (path for path in folder.glob(f"*_{name}") if whole.fullmatch(path.name))
    return sorted(path for path in found if path.is_dir())


def train(arguments: Sequence[str], log_file: Path) -> None:
    """Run the training command, with what it says in a file.

    If this process is stopped, the training gets the time to save; if it is killed, Linux tells
    the training to.
    """
    log_file.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(PROJECT / "main.py"), *arguments]
    with open(log_file, "ab") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=functools.partial(end_with_parent, signal.SIGTERM),
        )
        try:
            status = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if status:
        raise UserError(f"{log_file}: the training ended with status {status}: {_last(log_file)}")


def _last(log_file: Path) -> str:
    lines = log_file.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return (lines or [""])[-1].strip()[-TAIL:]
