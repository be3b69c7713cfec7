"""What a run's folder says of the run: its settings, its numbers and its pictures."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.config import load_config, to_plain
from ldm.errors import UserError
from ldm.files import write_atomically
from ldm.host import environment
from ldm.reports.page import Figure, Figures, Page, Section, Table, picture
from ldm.reports.plots import Curve, curves

PAGE, SUMMARY, INDEX = "report.html", "report.json", "index.html"
FIXED = re.compile(r"val/loss_\w+_fixed$")
LOSS = re.compile(r"(train|val)/loss(_\w+)?$")
STEP = re.compile(r"_gs-(\d+)")
MOST_SHEETS = 8
RUNNING, RELOAD = "running", 30


@dataclass(frozen=True)
class RunFacts:
    """What a run's folder holds.

    Args:
        settings: its config, flat: a value for each dotted key.
        numbers: of each metric, its curve over the optimizer steps.
        summary: what the run said of itself last: `status`, `step`, `steps`.
    """

    folder: Path
    settings: Mapping[str, Any]
    numbers: Mapping[str, Curve]
    summary: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    def matching(self, pattern: re.Pattern[str]) -> dict[str, Curve]:
        """Return the curves of the metrics whose name matches."""
        return {name: curve for name, curve in self.numbers.items() if pattern.match(name)}

    def last(self, pattern: re.Pattern[str] = FIXED) -> dict[str, float]:
        """Return the last value of each metric whose name matches."""
        return {name: curve[-1][1] for name, curve in self.matching(pattern).items()}


def read_run(folder: Path) -> RunFacts:
    """Read a run's folder; what is missing is empty."""
    configs = sorted((folder / "configs").glob("*.yaml"))
    settings = flat(to_plain(load_config(configs))) if configs else {}
    try:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        summary = {}
    return RunFacts(folder, settings, read_numbers(folder), summary)


def read_numbers(folder: Path) -> dict[str, Curve]:
    """Read a run's CSV files, in the order of its starts. Of a step that two starts have logged,
    the later start counts.

    Raises:
        UserError: a file has something else than numbers, as one that was damaged.
    """
    numbers: dict[str, dict[float, float]] = {}
    for path in sorted(folder.glob("csv/*/metrics.csv")):
        try:
            _add_numbers(path, numbers)
        except (ValueError, csv.Error) as error:
            raise UserError(f"{path}: damaged ({error}): mend or remove it") from error
    return {key: sorted(values.items()) for key, values in numbers.items()}


def _add_numbers(path: Path, numbers: dict[str, dict[float, float]]) -> None:
    """Add the rows of a CSV file to the values of each metric by step."""
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            step = float(row.get("step") or "nan")
            for key, text in row.items():
                if key not in (None, "step", "epoch") and text and math.isfinite(step):
                    numbers.setdefault(key, {})[step] = float(text)


def flat(value: object, key: str = "") -> dict[str, Any]:
    """Return nested mappings as one, its keys dotted; lists stay whole."""
    if not isinstance(value, Mapping) or not value:
        return {key: value} if key else {}
    found: dict[str, Any] = {}
    for name, inner in value.items():
        found |= flat(inner, f"{key}.{name}" if key else str(name))
    return found


def differences(runs: Sequence[RunFacts]) -> dict[str, list[Any]]:
    """Return the settings that are not the same in all runs, with each run's value."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    found: dict[str, list[Any]] = {}
    for key in keys:
        values = [run.settings.get(key) for run in runs]
        differs = any(value != values[0] for value in values)
        if differs:
            found[key] = values
    return found


def write_run_page(folder: Path, status: str, step: int, steps: int) -> None:
    """Write a run's page and its summary.

    Args:
        status: `running`, `finished`, or how it ended.
        step, steps: optimizer steps that are done, and that are wanted.
    """
    summary: dict[str, Any] = {"status": status, "step": step, "steps": steps}
    summary["environment"] = environment()
    facts = read_run(folder)
    summary["losses"] = facts.last()
    text = json.dumps(summary)
    write_atomically(folder / SUMMARY, lambda path: path.write_text(text, encoding="utf-8"))
    run_page(RunFacts(folder, facts.settings, facts.numbers, summary)).save(folder / PAGE)


def run_page(run: RunFacts) -> Page:
    """Return the page of a run."""
    status, step = run.summary.get("status", ""), run.summary.get("step", 0)
    sections = [*_loss_section(run), *_picture_sections(run), _settings_section(run)]
    subtitle = f"{status}: step {step} of {run.summary.get('steps', '?')}"
    return Page(run.name, subtitle, sections, RELOAD if status == RUNNING else None)


def compare_page(runs: Sequence[RunFacts], title: str) -> Page:
    """Return a page of runs side by side: what differs, their curves, their last sheets."""
    different = differences(runs)
    rows = [[key, *map(_shown, values)] for key, values in different.items()]
    sections = [
        Section(
            "What differs",
            [Table(f"{len(rows)} settings differ", ["setting", *[r.name for r in runs]], rows)],
        )
    ]
    names = dict.fromkeys(name for run in runs for name in run.numbers)
    plots = []
    for name in sorted(filter(LOSS.match, names), key=lambda name: not FIXED.match(name)):
        series = {run.name: run.numbers[name] for run in runs if run.numbers.get(name)}
        plots.append(curves(series, name))
    if plots:
        sections.append(Section("Losses", [Figures(plots)]))
    sheets = [sheet for run in runs for sheet in list(_sheets(run, "panel"))[-1:]]
    if sheets:
        sections.append(Section("Last panels", [Figures(sheets)]))
    return Page(title, f"{len(runs)} runs", sections)


def _loss_section(run: RunFacts) -> Iterator[Section]:
    """Yield the curves, those without the noise of sampling first."""
    fixed, others = run.matching(FIXED), run.matching(LOSS)
    rest = {name: curve for name, curve in others.items() if name not in fixed}
    plots = [
        curves(series, title)
        for series, title in (
            (fixed, "Losses at fixed time steps with fixed noise"),
            (rest, "Losses of the training's batches"),
        )
        if series
    ]
    if plots:
        yield Section("Losses", [Figures(plots)])


def _picture_sections(run: RunFacts) -> Iterator[Section]:
    """Yield the panel by step, then the last grids of the other kinds."""
    panels = list(_sheets(run, "panel", alone=True))
    if panels:
        yield Section("The panel: the same prompts from the same noise", [Figures(panels)])
    grids: list[Figure] = []
    for group in ("train", "val"):
        grids += _last_grids(run, group)
    if grids:
        yield Section("Grids of the last logged step", [Figures(grids)])


def _sheets(run: RunFacts, group: str, alone: bool = False) -> Iterator[Figure]:
    """Yield a group's pictures by step: the first, the last, and some between.

    Args:
        alone: on a page of this run, whose name need not be said.
    """
    paths = sorted((run.folder / "images" / group).glob("*.png"))
    count = min(len(paths), MOST_SHEETS)
    chosen = {round(n * (len(paths) - 1) / max(count - 1, 1)) for n in range(count)}
    for number in sorted(chosen):
        step = _step(paths[number])
        yield picture(
            paths[number],
            f"Sheet of labelled pictures of {run.name} at step {step}",
            f"step {step}" if alone else f"{run.name}, step {step}",
        )


def _last_grids(run: RunFacts, group: str) -> list[Figure]:
    paths = sorted((run.folder / "images" / group).glob("*.png"))
    last = max(map(_step, paths), default=-1)
    return [
        picture(path, f"Grid {_kind(path)} of step {last}", f"{group}: {_kind(path)}, step {last}")
        for path in paths
        if _step(path) == last
    ]


def _kind(path: Path) -> str:
    return path.stem.partition("_gs-")[0]


def _step(path: Path) -> int:
    found = STEP.search(path.stem)
    return int(found[1]) if found else -1


def _settings_section(run: RunFacts) -> Section:
    rows = [[key, _shown(value)] for key, value in run.settings.items()]
    machine = [[key, value] for key, value in run.summary.get("environment", {}).items()]
    heads = ["setting", "value"]
    return Section(
        "Settings",
        [
            Table(f"{len(rows)} settings", heads, rows, True),
            Table("The machine and the packages", ["what", "value"], machine, True),
        ],
    )


def _shown(value: object) -> str:
    return "" if value is None else str(value)
