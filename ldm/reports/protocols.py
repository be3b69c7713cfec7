"""The page of a protocol: a row a method, with intervals, and what its pictures look like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ldm.evaluation.protocols import Protocol
from ldm.evaluation.scores import MEASURED, Scored
from ldm.evaluation.tables import pinned
from ldm.reports.page import Figures, Page, Section, Table, Text, picture
from ldm.reports.plots import intervals

# DINO of table 1 of the paper, as an index of benchmarks has it (wizwand.com, DreamBench). The rest
# of the table stays out until somebody has read it off the paper.
PRINTED = {
    "DreamBooth (Imagen)": 0.696,
    "DreamBooth (Stable Diffusion)": 0.668,
}


def protocol_page(
    title: str,
    rows: Mapping[str, Scored],
    protocol: Protocol,
    sheets: Sequence[tuple[str, Path]],
    settings: Mapping[str, object],
) -> Page:
    """Return the page of a protocol's results.

    Args:
        rows: the scores of each method, and those of the real images.
        sheets: pictures' files with what they show.
        settings: what the command was asked for.
    """
    found = {name: scored.estimates() for name, scored in rows.items() if scored.rows}
    scores = [score for score in MEASURED if any(score in each for each in found.values())]
    means = [
        [name, *(str(each[score]) if score in each else "" for score in scores)]
        for name, each in found.items()
    ]
    plots = []
    for score in scores:
        having = {name: each[score] for name, each in found.items() if score in each}
        ends = {name: (e.mean, e.low, e.high) for name, e in having.items()}
        plots.append(intervals(ends, f"{score}: {MEASURED[score][1]}", score))
    sections = [
        Section(
            "Scores",
            [
                Table("Means and 95 % intervals over subjects and seeds", ["", *scores], means),
                Text(pinned(protocol, rows)),
                Text(protocol.source),
                Figures(plots),
            ],
        )
    ]
    if protocol.name == "paper":
        printed = [[name, figure] for name, figure in PRINTED.items()]
        table = Table("Ruiz et al., table 1, DINO", ["", "DINO"], printed)
        sections.append(Section("The paper's own", [table]))
    if sheets:
        shown = [
            picture(path, f"Sheet of labelled pictures: {what}", what) for what, path in sheets
        ]
        sections.append(Section("Pictures", [Figures(shown)]))
    single = [
        [name, row["subject"], row["seed"], *(_cell(row.get(score)) for score in scores)]
        for name, scored in rows.items()
        for row in scored.rows
    ]
    heads = ["", "subject", "seed", *scores]
    sections.append(Section("Each subject", [Table(f"{len(single)} rows", heads, single, True)]))
    asked = [[key, str(value)] for key, value in settings.items()]
    sections.append(Section("Settings", [Table("What was asked for", ["", ""], asked, True)]))
    return Page(title, f"{len(found)} rows", sections)


def _cell(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else ""
