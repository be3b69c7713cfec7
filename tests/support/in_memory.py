"""The tests' files in memory: hundreds of checkpoints, and a test waits until each is on the disk.

A run that is killed cannot remove its gigabytes. The next run does.
"""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

MEMORY, ENOUGH = Path("/dev/shm"), 4 * 2**30
OURS = "dreambooth-tests-"  # and the number of the process that made the folder


def keep_files_in_memory(memory: Path = MEMORY, enough: int = ENOUGH) -> None:
    """Let temporary files lie in memory until this process ends, if `enough` bytes are free there.

    A TMPDIR that is set is left as it is: so one keeps the files of a test that fails.
    """
    if "TMPDIR" in os.environ or not os.access(memory, os.W_OK | os.X_OK):
        return
    remove_left(memory)
    if shutil.disk_usage(memory).free < enough:
        return
    folder = memory / f"{OURS}{os.getpid()}"
    folder.mkdir(mode=0o700)
    atexit.register(remove_at_end, folder, os.getpid())
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)


def remove_left(memory: Path) -> None:
    """Remove the folders of processes that are gone."""
    for folder in memory.glob(f"{OURS}*"):
        if not Path("/proc", folder.name.removeprefix(OURS)).exists():
            shutil.rmtree(folder, ignore_errors=True)


def remove_at_end(folder: Path, owner: int) -> None:
    """Remove a folder, if this is the process that made it and not a copy of it."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
