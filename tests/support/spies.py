"""Callbacks of a test in a run, and what a run leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def spy(callback: type, /, **params: Any) -> str:
    """Return the override that adds a callback of a test module to a run."""
    target = f"{callback.__module__}.{callback.__name__}"
    return f"lightning.callbacks.{callback.__name__}={{target: {target}, params: {json.dumps(params)}}}"


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the lines with which commands have ended."""
    messages = [record.getMessage() for record in caplog.records]
    return [message for message in messages if message.startswith("error: ")]


def checkpoints(run: Path) -> list[str]:
    """Return the names of a run's checkpoints."""
    return sorted(path.name for path in (run / "checkpoints").iterdir())
