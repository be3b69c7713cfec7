"""The page of a sweep: its table, what each choice costs, and its trials side by side."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.reports.page import Figures, Link, Page, Section, Table, Text, picture
from ldm.reports.plots import curves, pareto, scatter
from ldm.reports.runs import FIXED, LOSS, PAGE, RunFacts, read_run

# What says how well a trial shows the subject, and how well it keeps the rest: the first of each
# that every trial has. A loss counts with its sign turned, so that more is better.
FIDELITY = ("DINO", "CLIP-I", "val/loss_subject_fixed", "train/loss_simple")
EDITABILITY = ("CLIP-T", "val/loss_prior_fixed", "train/loss_prior")
MOST_CURVES = 12
PINNED = ("protocol", "encoders")  # what stands beside every score; on the page once

Row = Mapping[str, Any]


def sweep_page(title: str, rows: Sequence[Row], runs: Mapping[str, Path]) -> Page:
    """Return the page of a sweep.

    Args:
        rows: a trial each: `trial`, its values, `status` and its numbers.
        runs: the run folders by trial, which lie in the folder `trials` beside the page.
    """
    done = [row for row in rows if row["status"] == "done"]
    names = {str(row["trial"]): named(row) for row in rows}
    sections = [
        *_trade_off(done),
        Section("Trials", [*_tables(rows, runs), *_pinned(rows)]),
        *_curves(runs, names),
        *_panels(runs, names),
    ]
    failed = len(rows) - len(done)
    subtitle = f"{len(done)} trials done" + (f", {failed} failed" if failed else "")
    return Page(f"Sweep {title}", subtitle, sections)


def named(row: Row) -> str:
    """Return a trial's number with the values that it tries: `003: base_learning_rate 0.0001`."""
    keys = itertools.takewhile(lambda key: key != "status", row)
    values = [f"{key.rpartition('.')[2]} {_cell(row[key])}" for key in keys if key != "trial"]
    return f"{row['trial']}: {', '.join(values)}" if values else str(row["trial"])


def axes(rows: Sequence[Row]) -> tuple[str, str] | None:
    """Return the numbers that stand for fidelity and editability, where all trials have some."""
    chosen = []
    for names in (FIDELITY, EDITABILITY):
        found = [name for name in names if all(isinstance(row.get(name), float) for row in rows)]
        if not found or not rows:
            return None
        chosen.append(found[0])
    return chosen[0], chosen[1]


def _trade_off(rows: Sequence[Row]) -> Iterator[Section]:
    """Yield the plot of what is won against what is lost, with its Pareto front."""
    found = axes(rows)
    if found is None:
        return
    points = {str(row["trial"]): (_worth(row, found[0]), _worth(row, found[1])) for row in rows}
    front = pareto(points)
    named = [f"-{name}" if "loss" in name else name for name in found]
    plot = scatter(points, front, named[0], named[1], "Fidelity and editability")
    text = f"No trial is better in both than one of the front: {', '.join(front)}."
    yield Section("Fidelity and editability", [Figures([plot]), Text(text)])


def _worth(row: Row, name: str) -> float:
    return -row[name] if "loss" in name else row[name]


def _tables(rows: Sequence[Row], runs: Mapping[str, Path]) -> list[Table]:
    """Return what the trials tried and what came of it; the losses of the last batch, which are
    mostly noise, stand in a table of their own.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row if key not in PINNED))
    noisy = [key for key in columns if LOSS.match(key) and not FIXED.match(key)]
    first = [key for key in columns if key not in noisy]
    tables = [_table("What the trials tried, and what came of it", first, rows, runs)]
    if noisy:
        caption = "Losses of the last batch, which are mostly noise"
        tables.append(_table(caption, ["trial", *noisy], rows, runs, folded=True))
    return tables


def _table(
    caption: str,
    columns: Sequence[str],
    rows: Sequence[Row],
    runs: Mapping[str, Path],
    folded: bool = False,
) -> Table:
    shown = []
    for row in rows:
        cells: list[str | Link] = [_cell(row.get(column)) for column in columns]
        run = runs.get(str(row["trial"]))
        if run is not None and (run / PAGE).is_file():
            cells[0] = Link(str(row["trial"]), f"{run.parent.name}/{run.name}/{PAGE}")
        shown.append(cells)
    return Table(caption, columns, shown, folded)


def _pinned(rows: Sequence[Row]) -> Iterator[Text]:
    """Yield what the scores are a function of, besides the pictures."""
    found = dict.fromkeys((row["protocol"], row["encoders"]) for row in rows if "protocol" in row)
    for protocol, encoders in found:
        yield Text(f"Protocol: {protocol}; encoders: {encoders}.")


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _curves(runs: Mapping[str, Path], trials: Mapping[str, str]) -> Iterator[Section]:
    """Yield the fixed-noise losses of the first trials, side by side."""
    facts: dict[str, RunFacts] = {name: read_run(runs[name]) for name in sorted(runs)[:MOST_CURVES]}
    names = dict.fromkeys(key for each in facts.values() for key in each.matching(FIXED))
    plots = []
    for name in names:
        series = {
            trials.get(trial, trial): each.numbers[name]
            for trial, each in facts.items()
            if name in each.numbers
        }
        plots.append(curves(series, name))
    if plots:
        yield Section("Losses at fixed time steps with fixed noise", [Figures(plots)])


def _panels(runs: Mapping[str, Path], trials: Mapping[str, str]) -> Iterator[Section]:
    """Yield the last panel of the first trials."""
    figures = []
    for name in sorted(runs)[:MOST_CURVES]:
        for path in sorted(runs[name].glob("images/panel/*.png"))[-1:]:
            shown = trials.get(name, name)
            alt = f"Sheet of labelled pictures of trial {shown} at its last panel"
            figures.append(picture(path, alt, f"trial {shown}"))
    if figures:
        yield Section("Last panels: the same prompts from the same noise", [Figures(figures)])
