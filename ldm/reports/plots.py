"""Plots as SVG inside a page, with their numbers in words."""

from __future__ import annotations

import io
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ldm.reports.page import Figure, data_uri

Curve = Sequence[tuple[float, float]]  # steps and values
SIZE = (5.6, 3.2)  # inches: two stand beside each other on a page
LEGEND = 0.22  # inches of a line of a legend
COLOURS, STYLES = 10, ("-", "--", ":")
MOST_POINTS = 600  # of a curve: more cannot be told apart


def curves(series: Mapping[str, Curve], title: str, axis: str = "loss") -> Figure:
    """Plot curves over the steps."""
    figure, axes = _axes("step", axis)
    for number, (name, points) in enumerate(series.items()):
        shown = thinned(points)
        marker = "o" if len(shown) < 20 else ""
        # The colours begin again after the last one.
        dashes = STYLES[number // COLOURS % len(STYLES)]
        axes.plot(*zip(*shown), dashes, label=name, marker=marker, markersize=3, linewidth=1.2)
    if series:
        _legend(figure, series)
    said = "; ".join(
        f"{name} from {points[0][1]:.4g} at step {points[0][0]:g} to {points[-1][1]:.4g} at step "
        f"{points[-1][0]:g}"
        for name, points in series.items()
    )
    return _figure(figure, f"{title}: {said}", title)


def scatter(
    points: Mapping[str, tuple[float, float]], front: Sequence[str], x: str, y: str, title: str
) -> Figure:
    """Plot named points, and a line through those of the Pareto front."""
    figure, axes = _axes(x, y)
    rest = [name for name in points if name not in front]
    if rest:
        axes.scatter(*zip(*(points[name] for name in rest)), color="#999999", s=18)
    ends = sorted((points[name] for name in front), key=lambda point: point[0])
    if ends:
        axes.plot(*zip(*ends), color="#c0392b", marker="o", markersize=5, linewidth=1.2)
    for name, place in points.items():
        axes.annotate(name, place, xytext=(4, 4), textcoords="offset points", fontsize=7)
    named = ", ".join(f"{name} ({points[name][0]:.3g}, {points[name][1]:.3g})" for name in front)
    alt = f"{title}: {len(points)} points; on the Pareto front of {x} and {y} are {named}"
    return _figure(figure, alt, title)


def intervals(
    rows: Mapping[str, tuple[float, float | None, float | None]], axis: str, title: str
) -> Figure:
    """Plot a mean and its interval for each name; a single value has none."""
    figure, axes = _axes(axis, "")
    figure.set_size_inches(SIZE[0], 0.8 + 0.35 * len(rows))
    said = []
    for place, (name, (mean, low, high)) in enumerate(rows.items()):
        axes.plot([mean], [-place], marker="o", color="#1c1c1c", markersize=4)
        interval = ""
        if low is not None and high is not None:
            axes.plot([low, high], [-place, -place], color="#1c1c1c", linewidth=1.2)
            interval = f" [{low:.3f}, {high:.3f}]"
        said.append(f"{name} {mean:.3f}{interval}")
    axes.set_yticks([-place for place in range(len(rows))], list(rows))
    axes.set_ylim(0.5 - len(rows), 0.5)  # none of them on the edge
    return _figure(figure, f"{title}: {'; '.join(said)}", title)


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Return the names of the points that no other one is at least as good as in both values, and
    better in one. More is better.
    """
    return [
        name
        for name, (x, y) in points.items()
        if not any(a >= x and b >= y and (a, b) != (x, y) for a, b in points.values())
    ]


def thinned(points: Curve) -> list[tuple[float, float]]:
    """Return at most `MOST_POINTS` of a curve, as means of neighbours; its ends stay."""
    count = len(points)
    if count <= MOST_POINTS:
        return list(points)
    edges = [number * count // (MOST_POINTS - 2) for number in range(MOST_POINTS - 1)]
    means = []
    for start, end in itertools.pairwise(edges):
        part = points[start:end]
        means.append((sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)))
    return [points[0], *means, points[-1]]


def _axes(x: str, y: str) -> tuple[Any, Any]:
    """Return an empty plot. It is drawn without a display, and without pyplot's global state."""
    from matplotlib.figure import Figure as Drawing

    figure = Drawing(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def _legend(figure: Any, names: Collection[str]) -> None:
    """Name the curves under the plot, where none runs through the names."""
    columns = 1 if max(map(len, names)) > 30 else min(3, len(names))
    lines = -(-len(names) // columns)
    figure.set_size_inches(SIZE[0], SIZE[1] + LEGEND * lines)
    figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=8)


def _figure(drawing: Any, alt: str, caption: str) -> Figure:
    import matplotlib

    buffer = io.BytesIO()
    # Without a date and with a fixed salt, the same numbers make the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "page"}):
        drawing.savefig(buffer, format="svg", metadata={"Date": None})
    return Figure(data_uri(buffer.getvalue(), "image/svg+xml"), alt, caption)
