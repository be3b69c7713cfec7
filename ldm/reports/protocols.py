"""The page of a protocol: a row a method, with intervals, and what its pictures look like."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ldm.evaluation.intervals import Estimate
from ldm.evaluation.protocols import Protocol
from ldm.evaluation.scores import MEASURED, Scored
from ldm.evaluation.tables import differences, differences_caption, pinned
from ldm.reports.page import Figures, Page, Section, Table, Text, picture
from ldm.reports.plots import intervals, pareto, scatter

# DINO of table 1 of the paper, as an index of benchmarks has it (wizwand.com, DreamBench). The rest
# of the table stays out until somebody has read it off the paper.
PRINTED = {
    "DreamBooth (Imagen)": 0.696,
    "DreamBooth (Stable Diffusion)": 0.668,
}

# Likeness to the subject, and what it may cost: following the prompt, and the class as it was. A
# score of which less is better stands with its sign turned: on both axes, more is better.
LIKENESS = "DINO"
TRADE_OFFS = (("CLIP-T", 1, "CLIP-T"), ("PRES", -1, "-PRES"))


def protocol_page(
    title: str,
    rows: Mapping[str, Scored],
    protocol: Protocol,
    sheets: Sequence[tuple[str, Path]],
    settings: Mapping[str, object],
    reference: str = "",
    lacking: str = "",
) -> Page:
    """Return the page of a protocol's results.

    Args:
        rows: the scores of each method, and those of the real images.
        sheets: pictures' files with what they show.
        settings: what the command was asked for.
        reference: the row that the others are compared with by pairs; "" for none.
        lacking: says which scores are not there; "" where all are.
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
                *([Text(lacking)] if lacking else []),
                Text(pinned(protocol, rows)),
                Text(protocol.source),
                Figures(plots),
            ],
        )
    ]
    sections += _compared(rows, reference)
    sections += _trade_offs(found)
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


def _compared(rows: Mapping[str, Scored], reference: str) -> Iterator[Section]:
    """Yield what the other rows score more or less than the reference."""
    found = differences(rows, reference) if reference in rows else {}
    if not found:
        return
    scores = [score for score in MEASURED if any(score in each for each in found.values())]
    means = [
        [name, *(each[score].written(signed=True) if score in each else "" for score in scores)]
        for name, each in found.items()
    ]
    yield Section(
        f"Against {reference}", [Table(differences_caption(reference), ["", *scores], means)]
    )


def _trade_offs(found: Mapping[str, Mapping[str, Estimate]]) -> Iterator[Section]:
    """Yield what likeness to the subject costs, with the Pareto fronts of the methods."""
    figures = []
    for kept, sign, axis in TRADE_OFFS:
        having = {name: each for name, each in found.items() if {LIKENESS, kept} <= each.keys()}
        points = {
            name: (each[LIKENESS].mean, sign * each[kept].mean) for name, each in having.items()
        }
        if len(points) > 1:
            title = f"{LIKENESS} and {axis}"
            figures.append(scatter(points, pareto(points), LIKENESS, axis, title))
    if figures:
        yield Section("What likeness to the subject costs", [Figures(figures)])


def _cell(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else ""
