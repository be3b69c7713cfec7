"""Class images: their numbers beside the user's files, and what they say of their class."""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from ldm.data.personalized import PersonalizedBase
from ldm.errors import UserError
from ldm.sampling import class_images
from ldm.sampling.class_images import check_class, make_class_images
from ldm.sampling.metadata import picture_texts, read_recipe
from ldm.sampling.pictures import next_number, save_png
from ldm.sampling.text_to_image import Recipe
from ldm.tiny.miniature import WEIGHTS
from ldm.training import prepare
from scripts import class_images as command_of_class_images
from tests.support.together import of_torchrun, together

PROMPT = "photo of a dog"


@pytest.fixture
def make(monkeypatch):
    """Make class images of grey pictures."""

    def draw(model, prompts, seeds, recipe, precision):
        return [Image.new("RGB", (recipe.width, recipe.height), "grey") for _ in prompts]

    monkeypatch.setattr(class_images, "text_to_image", draw)
    model = SimpleNamespace(device=torch.device("cpu"), training=False)
    model.to = model.eval = model.train = lambda *_: model

    def call(folder, count, **more):
        make_class_images(model, folder, [PROMPT], count, 8, 0, torch.device("cpu"), **more)

    return call


@pytest.mark.parametrize(
    "name",
    ["00012.png", "00012.jpg", "00012.txt", "00012.caption", "00012.mask.png", "12.webp", "00012"],
)
def test_numbers_go_on_behind_the_users_files(make, tmp_path, name):
    (tmp_path / name).write_text("the user's")
    make(tmp_path, 3)
    made = sorted(path.name for path in tmp_path.iterdir() if path.name != name)
    assert made == ["00013.png", "00014.png", "00015.png"]
    assert (tmp_path / name).read_text() == "the user's"


@pytest.mark.parametrize("name", ["IMG_2024.png", "photo (3).jpg", "a7.txt", ".00012.png.77.tmp"])
def test_other_names_do_not_count(make, tmp_path, name):
    (tmp_path / name).write_text("the user's")
    make(tmp_path, 1)
    assert (tmp_path / "00000.png").exists()


def test_numbers_behind_a_prefix(tmp_path):
    for name in ("grid-0003.png", "grid-0007.txt", "grid-x.png", "00012.png"):
        (tmp_path / name).touch()
    assert next_number(tmp_path, "grid-") == 8
    assert next_number(tmp_path / "none") == 0


def test_pictures_of_nothing_have_an_empty_caption(make, tmp_path):
    make(tmp_path, 3, unconditional=0.5)
    make(tmp_path, 3, unconditional=0.5)
    data = PersonalizedBase(tmp_path, size=8, reg=True)
    assert [data.captions[path] for path in data.paths] == [[PROMPT], [""]] * 3


# Stopped, and by several processes


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_run_that_was_cut_short_is_completed_as_it_would_have_been(make, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    make(whole, 6, unconditional=0.5, batch_size=2)
    draw, calls = class_images.text_to_image, []

    def stopped(*arguments, **how):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return draw(*arguments, **how)

    monkeypatch.setattr(class_images, "text_to_image", stopped)
    with pytest.raises(KeyboardInterrupt):
        make(cut, 6, unconditional=0.5, batch_size=2)
    assert names(cut) == [".class_images.json", "00000.png", "00002.png"]
    make(cut, 4, unconditional=0.5, batch_size=2)
    assert names(cut) == names(whole)
    for path in whole.glob("*.png"):
        found = Image.open(cut / path.name).text["parameters"]
        assert found == Image.open(path).text["parameters"]


def test_of_trainings_that_share_a_folder_one_fills_it(tmp_path, monkeypatch):
    class Concept:
        class_folder, class_prompts, class_size = tmp_path / "dog", [PROMPT], 8

        @property
        def class_images_to_make(self):
            return 2 - len(list(self.class_folder.glob("*.png")))

    made = []

    def make(folder, count, **how):
        made.append(count)
        time.sleep(0.05)
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            (folder / f"{number}.png").touch()

    monkeypatch.setattr(prepare, "make_class_images", make)
    data = SimpleNamespace(num_class_images=2, seed=0, class_images={})
    given = None, data, Concept(), torch.device("cpu"), False
    trainings = [threading.Thread(target=prepare._make_class_images, args=given) for _ in range(3)]
    for training in trainings:
        training.start()
    for training in trainings:
        training.join()
    assert made == [2]
    assert names(tmp_path / "dog") == ["0.png", "1.png"]


def test_removed_pictures_are_replaced_by_others(make, tmp_path):
    make(tmp_path, 4)
    (tmp_path / "00001.png").unlink()
    make(tmp_path, 1)
    assert names(tmp_path) == ["00000.png", "00002.png", "00003.png", "00004.png"]


def test_a_plan_of_other_pictures_does_not_count(make, tmp_path):
    (tmp_path / ".class_images.json").write_text('{"begin": 0, "end": 9, "series": {}}')
    (tmp_path / "00003.png").write_text("the user's")
    make(tmp_path, 2)
    assert names(tmp_path) == ["00003.png", "00004.png", "00005.png"]


@pytest.mark.usefixtures("one_thread")
def test_the_command_fills_a_folder(model_once, tmp_path, capsys, caplog):
    """It draws what is missing, alone or as two processes, and shows all on a sheet."""
    caplog.set_level("INFO")
    folder, sheets = tmp_path / "dog", tmp_path / "sheets"
    common = ["--ckpt", str(WEIGHTS), "--class_word", "dog", "--size", "32", "--exact"]
    common += ["--sampler", "ddim", "--steps", "1", "--eta", "1", "--sheets", str(sheets)]
    command = [*common, "--outdir", str(folder), "--num"]
    assert command_of_class_images.main([*command, "2"]) == 0
    assert command_of_class_images.main([*command, "3"]) == 0
    assert command_of_class_images.main([*command, "3"]) == 0
    assert "has 3 class images: nothing to draw" in capsys.readouterr().out
    assert names(folder) == ["00000.png", "00001.png", "00002.png"]
    assert names(sheets) == ["dog-0000.png", "dog-0001.png"]
    assert re.search(r"1 class images in [\d.]+ s: [\d.e+]+ a second", caplog.text)
    recipe = read_recipe(folder / "00002.png")
    assert (recipe["prompt"], recipe["eta"], recipe["model"]) == (PROMPT, 1.0, WEIGHTS.stem)

    (tmp_path / "two").mkdir()
    two = [*common, "--outdir", str(tmp_path / "two/dog"), "--num", "3"]
    together(tmp_path, lambda rank: command_of_class_images.main(two), of_torchrun)
    assert names(tmp_path / "two/dog") == names(folder)
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "two/dog" / path.name).read_bytes()


def test_the_command_adds_no_other_class_to_a_folder(model_once, tmp_path, caplog):
    command = ["--ckpt", str(WEIGHTS), "--size", "32", "--sampler", "ddim", "--steps", "1"]
    command += ["--outdir", str(tmp_path / "out"), "--sheets", str(tmp_path / "sheets")]
    assert command_of_class_images.main([*command, "--class_word", "dog", "--num", "1"]) == 0
    assert command_of_class_images.main([*command, "--class_word", "cat", "--num", "2"]) == 1
    assert "made as 'photo of a dog', and the class word is 'cat'" in caplog.text
    assert names(tmp_path / "out") == ["00000.png"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--sheets", "{out}"], "is in --outdir; choose another folder"),
        (["--sheets", "{out}/sheets"], "is in --outdir; choose another folder"),
        (["--scale", "nan"], "--scale nan: expected a number"),
        (["--seed", "-5"], "--seed -5: expected a whole number from 0 to"),
    ],
)
def test_what_the_command_cannot_do_is_one_line(tmp_path, caplog, flags, message):
    out = str(tmp_path / "out")
    command = ["--ckpt", str(WEIGHTS), "--class_word", "dog", "--outdir", out]
    assert command_of_class_images.main([*command, *(flag.format(out=out) for flag in flags)]) == 1
    assert message in caplog.messages[-1]
    assert not (tmp_path / "out").exists()


def test_a_damaged_picture_is_named_and_not_counted(tmp_path, caplog):
    """With it the folder would be full, and the training would stop at it."""
    folder = tmp_path / "dog"
    folder.mkdir()
    for name in ("whole.png", "half.png"):
        Image.effect_noise((40, 30), 60).convert("RGB").save(folder / name)
    content = (folder / "half.png").read_bytes()
    (folder / "half.png").write_bytes(content[: len(content) // 2])
    flags = ["--ckpt", str(WEIGHTS), "--class_word", "dog", "--num", "2", "--outdir", str(folder)]
    assert command_of_class_images.main([*flags, "--sheets", str(tmp_path / "sheets")]) == 1
    assert "half.png" in caplog.records[-1].getMessage()
    assert sorted(path.name for path in folder.iterdir()) == ["half.png", "whole.png"]


def test_by_default_the_command_draws_with_the_ancestral_sampler(model_once, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        command_of_class_images, "make_class_images", lambda *_, **how: calls.append(how)
    )
    monkeypatch.setattr(command_of_class_images, "sheet_of", lambda *_: "")
    command = ["--ckpt", str(WEIGHTS), "--class_word", "dog", "--outdir", str(tmp_path / "dog")]
    assert command_of_class_images.main(command) == 0
    assert command_of_class_images.main([*command, "--seed", "-1"]) == 0
    assert (calls[0]["sampler"], calls[0]["steps"]) == ("ddpm", 1000)
    assert calls[0]["seed"] == 23 and calls[1]["seed"] >= 0, "-1 is a random seed, as of txt2img.py"


# What is of another class


def made_as(folder, prompt, number=0):
    path = folder / f"{number:05}.png"
    save_png(Image.new("RGB", (8, 8)), path, picture_texts(prompt, Recipe()))
    return path


def test_class_images_of_another_class_are_refused(tmp_path):
    images = [made_as(tmp_path, "photo of a cat", number) for number in range(3)]
    check_class(images, "cat")
    with pytest.raises(UserError) as error:
        check_class(images, "dog")
    assert str(error.value) == (
        f"{images[0]} and 2 more: made as 'photo of a cat', and the class word is 'dog': "
        "make 'cat' the class word, or give class images another folder"
    )
    with pytest.raises(UserError, match="'one cat'"):
        check_class([made_as(tmp_path, "one cat", 9)], "dog", ["a {class_word}", "one {}"])


@pytest.mark.parametrize(
    "prompt", ["photo of a dog", "photo of a Dog in the park", "two dogs", "", "dog"]
)
def test_class_images_of_the_class_are_not_worth_a_word(tmp_path, caplog, prompt):
    check_class([made_as(tmp_path, prompt)], "dog")
    assert not caplog.records


def test_other_prompts_are_said(tmp_path, caplog):
    check_class([made_as(tmp_path, "a puppy")], "dog")
    assert "00000.png: made as 'a puppy', and the class word is 'dog'" in caplog.text


def test_older_pictures_and_those_of_others(tmp_path, caplog):
    old = tmp_path / "old.png"
    save_png(
        Image.new("RGB", (8, 8)), old, {"parameters": json.dumps({"prompt": "photo of a cat"})}
    )
    with pytest.raises(UserError, match="photo of a cat"):
        check_class([old], "dog")
    save_png(
        Image.new("RGB", (8, 8)), tmp_path / "web.png", {"parameters": "photo of a cat\nSteps: 20"}
    )
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.jpg")
    (tmp_path / "broken.png").write_text("nothing")
    with caplog.at_level(logging.WARNING):
        check_class([tmp_path / name for name in ("web.png", "photo.jpg", "broken.png")], "dog")
    assert not caplog.records
