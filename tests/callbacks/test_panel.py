"""A panel of fixed prompts beside the grids of a run."""

from types import SimpleNamespace

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main
from ldm.callbacks.panel import Panel
from tests.support.runs import checkpoint, same
from tests.support.spies import panels, with_panel


@pytest.fixture(scope="module")
def paneled(workspace):
    return workspace.train("panel", with_panel({"images": 2}))


def test_a_panel_comes_with_the_grids_and_before_the_first_step(paneled):
    assert panels(paneled) == [f"panel_gs-{step:06}.png" for step in (0, 2, 4)]
    sheets = [Image.open(path) for path in sorted((paneled / "images/panel").iterdir())]
    assert (
        len({sheet.tobytes() for sheet in sheets}) == 3
        and len({sheet.size for sheet in sheets}) == 1
    )
    events = EventAccumulator(str(paneled / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Images("panel/panel")] == [0, 2, 4]


@pytest.mark.parametrize("more", [[], ["model.params.use_ema=true"]])
def test_a_panel_changes_nothing(workspace, paneled, plain, more):
    with_it, without = paneled, plain
    if more:
        with_it = workspace.train("panel-ema", with_panel({"images": 1}), *more)
        without = workspace.train("plain-ema", *more)
    ours, theirs = checkpoint(with_it), checkpoint(without)
    assert same(ours["state_dict"], theirs["state_dict"]) and same(
        ours["optimizer_states"], theirs["optimizer_states"]
    )


def test_panels_of_the_same_weights_are_the_same(workspace, paneled):
    again = workspace.train("panel-again", with_panel({"images": 2, "every_n_steps": 4}), "data.params.batch_size=2",
                            "--max_steps", "1")  # fmt: skip
    assert panels(again) == ["panel_gs-000000.png", "panel_gs-000001.png"]  # the first and the last
    first, second = (run / "images/panel/panel_gs-000000.png" for run in (paneled, again))
    assert Image.open(first).tobytes() == Image.open(second).tobytes()


@pytest.mark.parametrize("panel", [None, False])
def test_no_panel(workspace, panel):
    run = workspace.train(f"no-panel-{panel}", with_panel(panel), "--max_steps", "2")
    assert panels(run) == [] and list(run.glob("images/train/*"))


def test_the_rows_of_a_panel():
    found = {"subject_prompts": ["photo of a sks car"], "class_prompts": ["", "photo of a car"]}
    data = SimpleNamespace(summary=lambda: found)
    assert Panel().prompts(data) == [
        "photo of a sks car",
        "photo of a car",
        "a photo of a house",
        "a photo of a tree",
    ]
    found["class_prompts"] = []
    assert Panel(unrelated=["a cat"]).prompts(data) == ["photo of a sks car", "a cat"]
    assert Panel(prompts=["x", "y"]).prompts(data) == ["x", "y"]
    assert Panel().prompts(SimpleNamespace()) == []
    # Of several subjects, each has its rows.
    owl = {"subject_prompts": ["a shs owl"], "class_prompts": ["an owl"]}
    both = SimpleNamespace(summary=lambda: {**found, "concepts": [found, owl]})
    assert Panel(unrelated=["a cat"]).prompts(both) == [
        "photo of a sks car", "a shs owl", "an owl", "a cat",
    ]  # fmt: skip


@pytest.mark.parametrize("panel, words", [
    ({"image": 2}, "panel.image: unknown key"), ({"images": 0}, "panel.images: expected 1 or "
                                                                "more, got 0"),
    ({"prompts": "a cat"}, "panel.prompts: expected a list of prompts, got "
                           "'a cat'"), (3, "panel: expected a mapping"),
])  # fmt: skip
def test_a_panel_that_cannot_be(workspace, caplog, panel, words):
    assert main.main(workspace.arguments("bad-panel", with_panel(panel))) == 1
    assert words in caplog.text
