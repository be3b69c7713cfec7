"""The page of a protocol, from scores that can be worked out on paper."""

from ldm.evaluation.protocols import find_protocol
from ldm.evaluation.scores import REAL, Scored
from ldm.reports.protocols import protocol_page
from tests.support.pages import read_page


def scored(**scores):
    rows = [
        {"subject": subject, "seed": seed, **{name: value + luck for name, value in scores.items()}}
        for subject, luck in (("cat", 0.0), ("dog", 0.1))
        for seed in ("1", "2")
    ]
    return Scored("custom", {"DINO": "0" * 12}, rows)


def test_the_page_says_what_likeness_costs_and_what_lies_between_the_methods(tmp_path):
    rows = {
        REAL: scored(DINO=0.8),
        "full": scored(DINO=0.5, **{"CLIP-T": 0.3, "PRES": 0.6}),
        "none": scored(DINO=0.5, **{"CLIP-T": 0.2, "PRES": 0.7}),
        "half": scored(DINO=0.4, **{"CLIP-T": 0.4, "PRES": 0.5}),
    }
    settings = {"flags": "--max_steps 5"}
    protocol_page("Two", rows, find_protocol("custom"), [], settings, "full").save(
        tmp_path / "page.html"
    )
    page = read_page(tmp_path / "page.html")
    # The mean of the two subjects is 0.05 over each value.
    front = "on the Pareto front of DINO and {} are full ({}), half ({})"
    said = [text for text in page.alternatives if "Pareto" in text]
    assert len(said) == 2
    assert front.format("CLIP-T", "0.55, 0.35", "0.45, 0.45") in said[0]
    assert front.format("-PRES", "0.55, -0.65", "0.45, -0.55") in said[1]
    assert "Against full" in page.words and "+0.100 [+0.100, +0.100]" in page.words

    # Without a reference, or with one method, there is nothing to compare.
    alone = {"full": rows["full"]}
    protocol_page("One", alone, find_protocol("custom"), [], settings).save(tmp_path / "one.html")
    page = read_page(tmp_path / "one.html")
    assert "Against" not in page.words and not any("Pareto" in text for text in page.alternatives)
