"""A run made again from its own folder, and what is compared."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ldm.checkpoints.reading import read_checkpoint
from ldm.errors import UserError
from ldm.host import environment
from ldm.reports.runs import SUMMARY
from ldm.sampling.text_to_image import Recipe
from ldm.studies.drawing import draw, series
from ldm.studies.replay import (
    changes_since,
    compare_pictures,
    compare_weights,
    recipe_in_file,
    replay_file,
    replay_run,
)
from scripts import replay
from tests.training.test_exactness import WORDS


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


def test_a_folder_of_another_replay_is_refused(base_model, tmp_path, in_this_process):
    """What it has made would be compared with a run that it does not come from."""
    run, out = base_model.parents[1], tmp_path / "out"
    assert replay_run(run, out).same and len(in_this_process) == 1
    assert replay_run(run, out).same and len(in_this_process) == 1  # it is there
    with pytest.raises(UserError, match="out: holds another replay; choose another folder"):
        replay_run(run, out, more=["--seed", "7"])


@pytest.fixture(scope="module")
def exported(workspace, base_model):
    """A run that adapts the base model, and what it wrote beside its checkpoints."""
    more = ["--actual_resume", str(base_model), "--export", "fp16", "--max_steps", "3"]
    lora = ["model.params.lora={rank: 2}", "model.params.use_ema=false"]
    every = "lightning.modelcheckpoint.params.every_n_train_steps=2"
    return workspace.train("adapted", *more, *lora, every)


@pytest.mark.parametrize(
    "name", ["*-fp16.safetensors", "lora.safetensors", "last.ckpt", "*=2.ckpt"]
)
def test_a_file_of_weights_says_how_it_is_made_again(
    workspace, base_model, exported, tmp_path, name, capsys, caplog
):
    """Far from its run: of the folders, an export keeps nothing; a checkpoint all."""
    (path,) = (exported / "checkpoints").glob(name.replace("=", "=*"))
    file = shutil.copy(path, tmp_path / path.name)
    flags = [file, "--ckpt", base_model]
    if path.suffix != ".ckpt":
        assert str(workspace.path) not in Path(file).read_bytes()[:100_000].decode(errors="replace")
        assert replay.main(list(map(str, flags))) == 1
        assert "give --data_root DIR and --reg_data_root DIR" in caplog.text
        flags += ["--data_root", workspace.photos, "--reg_data_root", workspace.class_images]
    assert replay.main(list(map(str, flags))) == 0
    assert "now: the same" in capsys.readouterr().out
    assert "the machine and the packages are the same as then" in caplog.text


def test_a_file_of_other_weights_is_not_the_same(workspace, base_model, exported, tmp_path, capsys):
    (path,) = (exported / "checkpoints").glob("*-fp16.safetensors")
    content = read_checkpoint(path, mapped=False)
    key = "model.diffusion_model.out.2.bias"
    content[key] = content[key] + 0.5
    torch.save(content, tmp_path / "other.ckpt")
    flags = [str(tmp_path / "other.ckpt"), "--ckpt", str(base_model)]
    flags += ["--data_root", str(workspace.photos), "--reg_data_root", str(workspace.class_images)]
    assert replay.main(flags) == 1
    assert f"not the same: {key} differs by up to 0.5" in capsys.readouterr().out


def test_new_words_are_made_again_from_their_runs_folder(workspace, base_model, capsys):
    run = workspace.train("words", *WORDS, "--actual_resume", str(base_model), "--max_steps", "2")
    file = run / "checkpoints/learned_embeds.safetensors"
    assert recipe_in_file(file) is None
    assert replay.main([str(file), "--ckpt", str(base_model)]) == 0
    assert "now: the same" in capsys.readouterr().out


def test_weights_that_were_mixed_are_refused(tmp_path):
    content = {"state_dict": {"a": torch.zeros(1)}, "training": {"recipe": {}, "mixed": {}}}
    torch.save(content, tmp_path / "mixed.ckpt")
    with pytest.raises(UserError, match="was mixed with other weights after its training"):
        replay_file(tmp_path / "mixed.ckpt", tmp_path)


def test_a_picture_is_drawn_when_it_is_missing_and_is_then_the_same(
    base_model, tmp_path, capsys, caplog
):
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
    # Its file says how to draw it again, and on what machine it was drawn.
    assert replay.main([str(wanted[2].path)]) == 0
    assert "now: the same" in capsys.readouterr().out
    assert "the machine and the packages are the same as then" in caplog.text


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
        ("x.safetensors", "x.safetensors: holds no recipe of a training"),
    ],
)
def test_what_cannot_be_made_again_is_one_line(tmp_path, caplog, make, message):
    path = tmp_path / (make or "nowhere")
    if make == "folder":
        path.mkdir()
    elif make:
        save_file({"a": torch.zeros(1)}, path)
    caplog.set_level(logging.INFO)
    assert replay.main([str(path)]) == 1
    assert message in caplog.text
