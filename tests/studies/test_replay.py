"""A run made again from its own folder, and what is compared."""

import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.errors import UserError
from ldm.host import environment
from ldm.reports.runs import SUMMARY
from ldm.sampling.text_to_image import Recipe
from ldm.studies.drawing import draw, series
from ldm.studies.replay import changes_since, compare_pictures, compare_weights, replay_run
from scripts import replay


def test_a_run_is_made_again_to_the_bit(workspace, base_model, tmp_path, capsys, caplog):
    weights = base_model
    run = workspace.train(
        "tuned", "--max_steps", "2", "--seed", "5", "--actual_resume", str(weights)
    )
    then = {**environment(), "torch": "2.0"}
    (run / SUMMARY).write_text(json.dumps({"environment": then}))
    assert replay.main([str(run), "--ckpt", str(weights)]) == 0
    assert "now: the same" in capsys.readouterr().out
    assert f"torch: 2.0 then, {environment()['torch']} now" in caplog.text
    # Another start is refused, and so is none.
    with pytest.raises(UserError, match=r"it started from last\.ckpt; give that with --ckpt"):
        replay_run(run, tmp_path)
    with pytest.raises(UserError, match=r"not the weights that .* started from"):
        replay_run(run, tmp_path, run / "checkpoints/last.ckpt")


def test_a_picture_is_drawn_when_it_is_missing_and_is_then_the_same(base_model, tmp_path, capsys):
    wanted = series(["a dog", "a cat"], 2, tmp_path)
    recipe = Recipe(steps=2, height=32, width=32)
    assert draw(base_model, wanted, recipe, batch_size=3) == 4
    before = [picture.path.read_bytes() for picture in wanted]
    assert len(set(before)) == 4
    for number in (1, 3):
        wanted[number].path.unlink()
    assert draw(base_model, wanted, recipe, batch_size=3) == 2
    assert [picture.path.read_bytes() for picture in wanted] == before
    assert draw(tmp_path / "nowhere.ckpt", wanted, recipe) == 0  # no model is needed for none
    # Its file says how to draw it again.
    assert replay.main([str(wanted[2].path)]) == 0
    assert "now: the same" in capsys.readouterr().out


def test_a_difference_is_named(tmp_path):
    state = {"a": torch.zeros(3), "b": torch.ones(2, dtype=torch.bfloat16)}
    torch.save({"state_dict": state}, tmp_path / "one.ckpt")
    other = {**state, "a": torch.tensor([0.0, 0.25, 0.0])}
    torch.save({"state_dict": other, "global_step": 7}, tmp_path / "other.ckpt")
    found = compare_weights(tmp_path / "one.ckpt", tmp_path / "other.ckpt")
    assert not found.same and str(found).endswith("not the same: a differs by up to 0.25")
    assert compare_weights(tmp_path / "one.ckpt", tmp_path / "one.ckpt").same

    pixels = np.full((4, 5, 3), 100, np.uint8)
    Image.fromarray(pixels).save(tmp_path / "one.png")
    pixels[0, 0, 0] = 97
    Image.fromarray(pixels).save(tmp_path / "other.png")
    found = compare_pictures(tmp_path / "one.png", tmp_path / "other.png")
    assert str(found).endswith("not the same: 1.7% of the values differ, by up to 3 of 255")


def test_what_changed_since_is_said():
    assert changes_since({}) == ["it is not recorded on what machine this was made"]
    assert changes_since(environment()) == ["the machine and the packages are the same as then"]


@pytest.mark.parametrize(
    "make, message",
    [
        ("", "no such file or folder"),
        ("folder", "it is no run's folder"),
        ("x.safetensors", "holds the model's config and not the training's"),
    ],
)
def test_what_cannot_be_made_again_is_one_line(tmp_path, caplog, make, message):
    path = tmp_path / (make or "nowhere")
    if make == "folder":
        path.mkdir()
    elif make:
        path.write_bytes(b"x")
    caplog.set_level(logging.INFO)
    assert replay.main([str(path)]) == 1
    assert message in caplog.text
