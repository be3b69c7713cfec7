"""From measured seconds to figures, and to a table of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, median
from typing import Any

GB, TERA = 1e9, 1e12
COLUMNS = ("", "s/step", "(mean)", "steps/s", "images/s", "peak GB", "TFLOP/s", "of peak")
RATIOS = ("speed", "memory")


def merged(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Merge several measurements of one variant: all their seconds, and the highest peak."""
    if failed := [m["failed"] for m in rounds if "failed" in m]:
        return {"failed": failed[0]}
    lists = {
        key: [value for m in rounds for value in m[key]]
        for key in rounds[0]
        if isinstance(rounds[0][key], list)
    }
    return {**rounds[0], **lists, "peak_bytes": max(m["peak_bytes"] for m in rounds)}


def figures(measured: Mapping[str, Any], images: int, peak_rate: float | None) -> dict[str, Any]:
    """Compute what a variant reached from what was measured.

    Args:
        measured: `seconds` of each repetition, which makes `images`; `peak_bytes`; `flops` of a
            repetition; of sampling also `step_seconds`, which a training's `seconds` are.
        peak_rate: of the machine, in floating-point operations per second.
    """
    if "failed" in measured:
        return dict(measured)
    steps, seconds = measured.get("step_seconds", measured["seconds"]), median(measured["seconds"])
    rate = measured["flops"] / seconds if measured["flops"] else None
    return {
        **measured,
        "images": images,
        "median_step_seconds": median(steps),
        "mean_step_seconds": mean(steps),
        "steps_per_second": 1 / median(steps),
        "images_per_second": images / seconds,
        "flops_per_second": rate,
        "share_of_peak": rate / peak_rate if rate and peak_rate else None,
    }


def compare(variants: Sequence[dict[str, Any]], compared_to: str) -> None:
    """Add to each variant how many times the images per second, and the memory, it has of the one
    compared to.
    """
    base = next(v for v in variants if v["name"] == compared_to)
    for variant in variants:
        if "failed" not in variant and "failed" not in base:
            variant["speed_ratio"] = variant["images_per_second"] / base["images_per_second"]
            if base["peak_bytes"]:  # none where an earlier row of the same process took more
                variant["memory_ratio"] = variant["peak_bytes"] / base["peak_bytes"]


def table(variants: Sequence[Mapping[str, Any]], compared_to: str) -> str:
    """Format the variants as a table in Markdown that is aligned for a terminal."""
    ratios = [f"{name}, x {compared_to}" for name in RATIOS]
    header = [*COLUMNS, *ratios]
    rows = [header]
    for variant in variants:
        rows.append([variant["name"], *_cells(variant)])
    return in_columns([row + [""] * (len(header) - len(row)) for row in rows])


def in_columns(rows: Sequence[Sequence[str]]) -> str:
    """Format a header and rows as long as it as a table in Markdown, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [_line([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    rule = _line("-" * (w - 1) + (":" if n else "-") for n, w in enumerate(widths))
    return "\n".join([lines[0], rule, *lines[1:]])


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(v: Mapping[str, Any]) -> list[str]:
    if "failed" in v:
        return [v["failed"]]
    return [
        f"{v['median_step_seconds']:.4g}",
        f"{v['mean_step_seconds']:.4g}",
        f"{v['steps_per_second']:.3g}",
        f"{v['images_per_second']:.3g}",
        f"{v['peak_bytes'] / GB:.2f}",
        "" if v["flops_per_second"] is None else f"{v['flops_per_second'] / TERA:.3g}",
        "" if v["share_of_peak"] is None else f"{v['share_of_peak']:.0%}",
        f"{v['speed_ratio']:.2f}" if "speed_ratio" in v else "",
        f"{v['memory_ratio']:.2f}" if "memory_ratio" in v else "",
    ]


def describe(measured: Mapping[str, Any]) -> str:
    """Describe the machine and show the table, for a person."""
    facts = measured["machine"]
    rates = ", ".join(
        f"{dtype} {rate / TERA:.3g}" for dtype, rate in facts["matmul_flops_per_second"].items()
    )
    where = facts.get("gpu") or f"{facts['cpu']}, {facts['threads']} threads"
    head = f"{where}; torch {facts['torch']}; TFLOP/s of a matrix product: {rates}"
    return f"{head}\n\n{table(measured['variants'], measured['compared_to'])}"
