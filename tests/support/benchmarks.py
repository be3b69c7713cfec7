"""The benchmark's command, called in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scripts import benchmark


def measured(tmp_path: Path, *command: object) -> dict[str, Any]:
    """Return what the command wrote as JSON."""
    assert benchmark.main([*map(str, command), "--json", str(tmp_path / "found.json")]) == 0
    return json.loads((tmp_path / "found.json").read_text())


def by_name(found: dict[str, Any]) -> dict[str, Any]:
    """Return the measured variants by their names."""
    return {variant["name"]: variant for variant in found["variants"]}
