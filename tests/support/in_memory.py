"""The tests' files in memory: hundreds of checkpoints, and a test waits until each is on the disk.

A run that is killed cannot remove its gigabytes. The next run does.
"""

import os
import shutil
import tempfile
from multiprocessing.util import Finalize
from pathlib import Path

MEMORY, ENOUGH = Path("/dev/shm"), 4 * 2**30
OURS = "dreambooth-tests-"  # and the number of the process that made the folder
AFTER_ITS_OWN = -200  # multiprocessing removes a folder that it has in ours with priority -100


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
    # At the end of this process; in a copy of it this does nothing.
    Finalize(None, shutil.rmtree, [folder], {"ignore_errors": True}, exitpriority=AFTER_ITS_OWN)
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)


def remove_left(memory: Path) -> None:
    """Remove the folders of processes that are gone."""
    for folder in memory.glob(f"{OURS}*"):
        if not Path("/proc", folder.name.removeprefix(OURS)).exists():
            shutil.rmtree(folder, ignore_errors=True)
