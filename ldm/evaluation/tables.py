"""Tables of scores, with their intervals and what pins them."""

from __future__ import annotations

from collections.abc import Mapping

from ldm.evaluation.intervals import Estimate
from ldm.evaluation.protocols import MINIATURE, NO_COMPARISON, Protocol
from ldm.evaluation.scores import MEASURED, REAL, Scored


def score_table(rows: Mapping[str, Scored], protocol: Protocol) -> str:
    """Return a table in Markdown: a row a method, a column a score or cost that any of them has.

    Under it stand the protocol and the hashes of the encoders: no score goes without them.
    """
    lines = _table({name: scored.estimates() for name, scored in rows.items()})
    return "\n".join([*lines, "", pinned(protocol, rows)])


def difference_table(differences: Mapping[str, Mapping[str, Estimate]], reference: str) -> str:
    """Return a table in Markdown of what each row scores more or less than the reference.

    Args:
        differences: of each row, the difference of each score.
    """
    return "\n".join([f"{differences_caption(reference)}:", "", *_table(differences, signed=True)])


def differences_caption(reference: str) -> str:
    """Say what a table of differences holds."""
    return (
        f"Scores less those of {reference}, by pairs of the same subject and seed. An interval "
        "with 0 in it decides nothing. With fewer than ten subjects, intervals are too narrow"
    )


def differences(rows: Mapping[str, Scored], reference: str) -> dict[str, dict[str, Estimate]]:
    """Return what every row but the reference scores more or less than it does."""
    found = {
        name: scored.against(rows[reference])
        for name, scored in rows.items()
        if name not in (REAL, reference)
    }
    return {name: each for name, each in found.items() if each}


def _table(found: Mapping[str, Mapping[str, Estimate]], signed: bool = False) -> list[str]:
    columns = [score for score in MEASURED if any(score in each for each in found.values())]
    heads = []
    for score in columns:
        larger_is_better = MEASURED[score][0]
        heads.append(f"{score} ↑" if larger_is_better else f"{score} ↓")
    lines = [f"| | {' | '.join(heads)} |", f"|---|{'---|' * len(columns)}"]
    for name, estimates in found.items():
        cells = [
            estimates[score].written(signed) if score in estimates else "-" for score in columns
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def pinned(protocol: Protocol, rows: Mapping[str, Scored]) -> str:
    """Say what a table's scores are a function of, besides the pictures."""
    hashes: dict[str, str] = {}
    for scored in rows.values():
        hashes |= scored.hashes
    encoders = ", ".join(f"{name} {digits}" for name, digits in sorted(hashes.items()))
    alone = f" ({NO_COMPARISON})" if protocol.dino == MINIATURE.dino else ""
    return (
        f"Protocol: {protocol.name}{alone}; encoders: {encoders}; {protocol.pairing}; identifier "
        f"{protocol.identifier} in the text; [95 % bootstrap intervals over subjects and seeds]."
    )
