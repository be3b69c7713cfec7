"""The tests' own files in memory: a run that was killed leaves none for long."""

import os
import subprocess
import sys

from tests.support.in_memory import OURS

RUN = """
import os, sys, tempfile
from pathlib import Path
from tests.support.in_memory import keep_files_in_memory
os.environ.pop("TMPDIR", None)
keep_files_in_memory(Path(sys.argv[1]), enough=0)
Path(tempfile.gettempdir(), "a file").touch()
if os.fork() == 0:
    sys.exit()  # a copy of the process ends first
os.wait()
print(tempfile.gettempdir(), Path(tempfile.gettempdir(), "a file").is_file())
"""


def test_the_folder_goes_with_its_process_and_those_that_were_left_go_too(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    left, alive = tmp_path / f"{OURS}{ended.pid}", tmp_path / f"{OURS}{os.getpid()}"
    for folder in (left, alive):
        folder.mkdir()
        (folder / "file").touch()
    said = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout.split()
    assert said[0].startswith(str(tmp_path / OURS)) and said[1] == "True"
    assert list(tmp_path.iterdir()) == [alive] and (alive / "file").is_file()
