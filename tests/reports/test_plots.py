"""Plots and what is computed for them."""

import base64

import pytest

from ldm.reports.plots import MOST_POINTS, curves, pareto, scatter, thinned


def test_a_pareto_front_is_what_nothing_beats():
    points = {"a": (1.0, 3.0), "b": (2.0, 2.0), "c": (1.5, 1.9), "d": (3.0, 1.0), "e": (1.0, 2.9)}
    assert pareto(points) == ["a", "b", "d"]
    assert pareto({"a": (1.0, 1.0), "b": (1.0, 1.0)}) == ["a", "b"]
    assert pareto({}) == []


@pytest.mark.parametrize("count", [2, MOST_POINTS, MOST_POINTS + 1, 10_000])
def test_a_long_curve_keeps_its_ends_and_its_mean(count):
    points = [(float(n), float(n * n % 97)) for n in range(count)]
    found = thinned(points)
    assert len(found) <= MOST_POINTS and found[0] == points[0] and found[-1] == points[-1]
    assert found == sorted(found)
    mean = sum(y for _, y in points) / count
    assert sum(y for _, y in found) / len(found) == pytest.approx(mean, rel=0.05)


def test_plots_say_their_numbers_and_are_the_same_again():
    figure = curves({"loss": [(0, 0.5), (10, 0.25)]}, "Losses")
    assert figure.alt == "Losses: loss from 0.5 at step 0 to 0.25 at step 10"
    assert figure == curves({"loss": [(0, 0.5), (10, 0.25)]}, "Losses")
    points = {"a": (0.5, 0.3), "b": (0.2, 0.1)}
    shown = scatter(points, pareto(points), "DINO", "CLIP-T", "Trials")
    assert "on the Pareto front of DINO and CLIP-T are a (0.5, 0.3)" in shown.alt
    svg = base64.b64decode(shown.source.partition(",")[2]).decode()
    assert ">DINO<" in svg and "<image" not in svg
