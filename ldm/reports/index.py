"""The list of a folder's runs, each with its last losses and its page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ldm.reports.page import Link, Page, Section, Table
from ldm.reports.runs import INDEX, PAGE, SUMMARY


def write_index(logs: Path) -> None:
    """Write `index.html` beside runs: one row for each that has said something of itself."""
    found = [(path.parent, _summary(path)) for path in sorted(logs.glob(f"*/{SUMMARY}"))]
    losses = list(dict.fromkeys(name for _, each in found for name in each.get("losses", {})))
    rows: list[list[Any]] = []
    for folder, each in found:
        values = each.get("losses", {})
        shown = [f"{values[name]:.4g}" if name in values else "" for name in losses]
        done = f"{each.get('step', '?')} of {each.get('steps', '?')}"
        link = Link(folder.name, f"{folder.name}/{PAGE}")
        rows.append([link, each.get("status", ""), done, *shown])
    table = Table("The newest last", ["run", "status", "steps", *losses], rows)
    Page(f"Runs in {logs.resolve().name}", f"{len(rows)} runs", [Section("Runs", [table])]).save(
        logs / INDEX
    )


def _summary(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
