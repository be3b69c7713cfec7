"""Tasks for the engines: they import nothing heavy, for each may run in a new process."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from ldm.errors import UserError

PATIENCE = 120.0  # seconds that a task waits for the other one


def meet(task: dict[str, Any]) -> str:
    """Return the name of a task once another one runs at the same time."""
    folder = Path(task["folder"])
    (folder / f"{task['name']}.here").touch()
    end = time.monotonic() + PATIENCE
    while len(list(folder.glob("*.here"))) < 2:
        if time.monotonic() > end:
            raise TimeoutError("no other task at once")
        time.sleep(0.05)
    return f"met {task['name']}"


def fail_or_die(task: dict[str, Any]) -> str:
    """Return a name; fail, or be killed in the middle, where the task says so. It dies once alone."""
    if task["name"] == "fails":
        raise UserError("it cannot be done")
    marker = Path(task["folder"]) / "died"
    if task["name"] == "dies" and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return f"did {task['name']}"
