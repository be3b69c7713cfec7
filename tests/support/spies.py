"""Overrides that add callbacks to a run, and what a run leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def spy(callback: type, /, **params: Any) -> str:
    """Return the override that adds a callback of a test module to a run."""
    target = f"{callback.__module__}.{callback.__name__}"
    return f"lightning.callbacks.{callback.__name__}={{target: {target}, params: {json.dumps(params)}}}"


def fixed(**params: Any) -> str:
    """Return the override that evaluates two examples of each half at three time steps, every two
    steps.
    """
    params = {"every_n_steps": 2, "examples": 2, "time_steps": 3, **params}
    return f"lightning.callbacks.fixed_loss={{target: ldm.callbacks.fixed_loss.FixedLoss, params: {json.dumps(params)}}}"


def with_panel(panel: Any, **params: Any) -> str:
    """Return the override that makes grids, with a panel or the `default` one, every two steps."""
    params = {
        "batch_frequency": 2,
        "increase_log_steps": False,
        "log_images_kwargs": {"ddim_steps": 2},
        **params,
    }
    params |= {} if panel == "default" else {"panel": panel}
    return f"lightning.callbacks.image_logger={{target: main.ImageLogger, params: {json.dumps(params)}}}"


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the lines with which commands have ended."""
    messages = [record.getMessage() for record in caplog.records]
    return [message for message in messages if message.startswith("error: ")]


def checkpoints(run: Path) -> list[str]:
    """Return the names of a run's checkpoints."""
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def panels(run: Path) -> list[str]:
    """Return the names of a run's panels."""
    return sorted(path.name for path in run.glob("images/panel/*"))
