"""Class images: their numbers beside the user's files, and what they say of their class."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from ldm.data.personalized import PersonalizedBase
from ldm.errors import UserError
from ldm.sampling import class_images
from ldm.sampling.class_images import check_class, make_class_images
from ldm.sampling.metadata import picture_texts
from ldm.sampling.pictures import next_number, save_png
from ldm.sampling.text_to_image import Recipe

PROMPT = "photo of a dog"


@pytest.fixture
def make(monkeypatch):
    """Make class images of grey pictures."""

    def draw(model, prompts, seeds, recipe):
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
