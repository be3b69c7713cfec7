"""A picture is a function of model, prompt, recipe and s + i, and is drawn again from its file."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ldm.models.diffusion.sampler_names import SAMPLERS, SIGMA_SAMPLERS
from ldm.models.diffusion.sigmas import SCHEDULES
from ldm.sampling import flags
from ldm.sampling.metadata import OURS
from ldm.sampling.pictures import save_png
from ldm.sampling.text_to_image import load_model
from ldm.tiny.miniature import WEIGHTS
from scripts import txt2img
from tests.support.together import of_torchrun, together

SMALL = ["--precision", "full", "--H", 32, "--W", 32, "--steps", 2, "--prompt", "a red car"]


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def same(first, second):
    return np.array_equal(pixels(first), pixels(second))


def recipe(path):
    return json.loads(Image.open(path).text[OURS])


# Again from the file


def random_recipes(count):
    """Recipes of every sampler that needs few steps, with whatever else varies."""
    chance = random.Random(0)
    names = [name for name in (*SAMPLERS, *SIGMA_SAMPLERS) if name != "ddpm"]
    for number in range(count):
        name = names[number % len(names)]
        given = ["--sampler", name, "--steps", chance.choice([2, 2, 3, 4]), "--precision", "full"]
        if name in SIGMA_SAMPLERS:
            given += [
                "--schedule",
                chance.choice([s for s in SCHEDULES if s != "align_your_steps"]),
            ]
        if name == "ddim":
            given += ["--ddim_eta", chance.choice([0, 0.3, 1])]
        given += ["--seed", chance.randrange(2**32), "--scale", chance.choice([1, 2.5, 1 / 3, 7.5])]
        width, height = chance.choice([(32, 32), (64, 32), (32, 64)])
        given += ["--H", height, "--W", width]
        given += ["--negative_prompt", chance.choice(["", 'blurry, dark: "night"'])]
        given += [
            "--prompt",
            chance.choice(["a red car", "a dog, in the snow: (photo)", "été\n犬"]),
        ]
        # Some are the last of a batch, in which kernels may round in another way.
        given += ["--n_iter", 1, "--n_samples", 1 if number % 4 else 2]
        yield given


def test_twenty_random_recipes_are_drawn_again_from_their_files(draw):
    for given in random_recipes(20):
        picture = draw(*given)[-1]
        (again,) = draw("--like", picture, outdir="again")
        assert Image.open(again).text == Image.open(picture).text, given
        assert same(picture, again), given


def test_flags_beside_like_change_the_recipe(draw):
    given = ["--sampler", "euler", "--schedule", "karras", "--n_samples", 2, "--n_iter", 1]
    picture = draw(*SMALL, *given, "--seed", 5)[1]
    (again,) = draw("--like", picture, "--sampler", "ddim", "--scale", 3, outdir="again")
    found = recipe(again)
    assert (found["sampler"], found["schedule"], found["scale"]) == ("ddim", None, 3)
    assert (found["seed"], found["index"], found["prompt"]) == (5, 1, "a red car")
    (other,) = draw("--like", picture, "--seed", 9, outdir="other")
    assert (recipe(other)["seed"], recipe(other)["index"]) == (9, 0)
    more = draw("--like", picture, "--n_samples", 3, "--n_iter", 1, outdir="more")
    assert [recipe(path)["index"] for path in more] == [0, 1, 2]


def test_like_of_weights_that_have_changed_is_refused(draw, tmp_path, caplog):
    ckpt = tmp_path / "last.safetensors"
    shutil.copy(WEIGHTS, ckpt)
    (picture,) = draw(*SMALL, "--ckpt", ckpt, "--n_samples", 1, "--n_iter", 1)
    with open(ckpt, "ab") as file:
        file.write(b" ")
    assert not draw("--like", picture, outdir="a", status=1)
    assert f"{ckpt} is not the file any more that drew it: give --ckpt FILE" in caplog.text
    ckpt.unlink()
    assert not draw("--like", picture, outdir="a", status=1)
    assert f"{ckpt}, which drew it, is not there: give --ckpt FILE" in caplog.text
    (again,) = draw("--like", picture, "--ckpt", WEIGHTS, outdir="a")
    assert same(picture, again)


def test_like_with_another_file_of_embeddings_is_refused(draw, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(flags, "load_model", load_model)  # the words are added to a fresh one
    words = tmp_path / "my-dog.safetensors"
    vector = 5 * torch.randn(1, 128, generator=torch.Generator().manual_seed(0))
    save_file({"emb_params": vector}, words)
    more = ["--embedding_path", words, "--n_samples", 1, "--n_iter", 1]
    (picture,) = draw(*SMALL, "--prompt", "a my-dog", *more)
    (again,) = draw("--like", picture, outdir="a")
    assert same(picture, again)
    save_file({"emb_params": -vector}, words)
    assert not draw("--like", picture, outdir="a", status=1)
    assert "not the file any more that it was drawn with: give --embedding_path" in caplog.text


def test_like_of_pictures_that_say_nothing_is_refused(draw, tmp_path, caplog):
    save_png(Image.new("RGB", (8, 8)), tmp_path / "plain.png")
    save_png(Image.new("RGB", (8, 8)), tmp_path / "comfy.png", {"prompt": "{}", "workflow": "{}"})
    (tmp_path / "text.png").write_text("no picture")
    old = {"prompt": "a dog", "steps": 2, "seed": 1, "index": 2, "ckpt": str(WEIGHTS)}
    save_png(Image.new("RGB", (8, 8)), tmp_path / "old.png", {OURS: json.dumps(old)})
    for name, words in (
        ("none.png", "no such file"),
        ("plain.png", "nothing in it says how it was made"),
        ("comfy.png", "nothing in it says how it was made"),
        ("text.png", "cannot read this picture"),
        ("old.png", "numbered noise in another way"),
    ):
        assert draw("--like", tmp_path / name, status=1) == []
        message = caplog.records[-1].getMessage()
        assert message.startswith(f"error: --like {tmp_path / name}: ") and words in message


@pytest.mark.parametrize(
    "edited, words",
    [
        ({"steps": "2"}, "steps '2' is not what we write"),
        ({"scale": None}, "scale None is not what we write"),
        ({"prompt": 5}, "prompt 5 is not what we write"),
        ({"ckpt": 5}, "ckpt 5 is not what we write"),
        ({"apg": ["x"]}, "apg ['x'] is not what we write"),
        ({"interval": [1]}, "--interval: expected LOW HIGH, got 1 numbers"),
        ({"batch": 2, "place": 7}, "says place 7 of a batch of 2"),
        ({"batch": 0}, "says place 0 of a batch of 0"),
    ],
)
def test_like_of_an_entry_that_was_edited_is_refused(draw, tmp_path, caplog, edited, words):
    whole = {"prompt": "a dog", "steps": 2, "height": 32, "width": 32, "ckpt": str(WEIGHTS)}
    texts = {OURS: json.dumps({**whole, **edited})}
    save_png(Image.new("RGB", (8, 8)), tmp_path / "edited.png", texts)
    assert draw("--like", tmp_path / "edited.png", status=1) == []
    assert words in caplog.records[-1].getMessage()


def test_a_grid_over_samplers_or_weights_leaves_those_of_the_picture(draw, tmp_path):
    ckpt = tmp_path / "last.safetensors"
    shutil.copy(WEIGHTS, ckpt)
    given = ["--sampler", "euler", "--schedule", "karras", "--n_samples", 1, "--n_iter", 1]
    (picture,) = draw(*SMALL, *given, "--ckpt", ckpt)
    ckpt.unlink()
    found = draw("--like", picture, "--x", "sampler=ddim,heun", "--y", f"checkpoint={WEIGHTS}")
    names = [(recipe(path)["sampler"], recipe(path)["schedule"]) for path in found]
    assert names == [("ddim", None), ("heun", "normal")]


# The web UI's pictures


def web_ui(tmp_path, fields, prompt="a red car, <lora:dog:0.8>"):
    path = tmp_path / f"web{len(list(tmp_path.glob('web*')))}.png"
    text = f"{prompt}\nNegative prompt: dark\n{fields}"
    save_png(Image.new("RGB", (8, 8)), path, {"parameters": text})
    return path


def test_a_recipe_of_the_web_ui_is_read(draw, tmp_path, caplog):
    caplog.set_level("INFO")
    fields = "Steps: 2, Sampler: DPM++ 2M, Schedule type: Automatic, CFG scale: 4.5, Seed: 77, "
    fields += 'Size: 64x32, Model hash: 0123456789, Model: "a, b", Clip skip: 2, Version: v1.10.1'
    path = web_ui(tmp_path, fields)
    assert draw("--like", path, status=1) == []
    assert "was drawn by 'a, b' (0123456789) elsewhere: give --ckpt FILE" in caplog.text
    (picture,) = draw("--like", path, "--ckpt", WEIGHTS)
    found = recipe(picture)
    assert (found["sampler"], found["schedule"]) == ("dpmpp_2m", "karras")
    assert (found["steps"], found["scale"], found["seed"]) == (2, 4.5, 77)
    assert (found["width"], found["height"], found["negative_prompt"]) == (64, 32, "dark")
    assert "left out: Clip skip 2, <lora:dog:0.8>" in caplog.text
    assert f"was drawn by other weights than {WEIGHTS}" in caplog.text
    assert "draws other noise" in caplog.text


@pytest.mark.parametrize(
    "prompt, more, expected",
    [
        ("a (red:1.5) car", "", "a1111"),
        ("a (red:1.5) car", ", Emphasis: None", None),
        ("a red car", "", None),
        ("a [red|blue] car", "", None),
    ],
)
def test_the_web_uis_brackets_are_read_as_it_reads_them(tmp_path, caplog, prompt, more, expected):
    fields = f"Steps: 2, Sampler: Euler, CFG scale: 4.5, Seed: 77, Size: 64x64{more}"
    args = flags.parse(
        txt2img.build_parser(),
        ["--like", str(web_ui(tmp_path, fields, prompt)), "--ckpt", str(WEIGHTS)],
    )
    assert args.weighting == expected
    assert ("read as plain words" in caplog.text) == ("|" in prompt)


def test_a_sampler_that_only_the_web_ui_has_is_named(draw, tmp_path, caplog):
    path = web_ui(tmp_path, "Steps: 2, Sampler: DPM adaptive, CFG scale: 7, Seed: 1, Size: 32x32")
    assert draw("--like", path, "--ckpt", WEIGHTS, status=1) == []
    assert "unknown 'DPM adaptive'" in caplog.text and "--sampler" in caplog.text
    assert len(draw("--like", path, "--ckpt", WEIGHTS, "--sampler", "euler")) == 1


def test_odd_fields_of_the_web_ui(draw, tmp_path, caplog):
    """A field that cannot be read is said; a flag in its place is enough."""
    # The schedule that was chosen last stands beside DDIM, too, which does not read it.
    fields = "Steps: 2.0, Sampler: DDIM, Schedule type: Karras, CFG scale: 7, Seed: 1, Size: 32*32"
    command = ["--like", web_ui(tmp_path, fields), "--ckpt", WEIGHTS]
    assert draw(*command, status=1) == []
    assert "Steps: expected a number, got 2.0" in caplog.text
    (picture,) = draw(*command, "--steps", 2, "--H", 32, "--W", 32)
    assert (recipe(picture)["sampler"], recipe(picture)["schedule"]) == ("ddim", None)
    assert "left out: Size 32*32, <lora:dog:0.8>" in caplog.text


def test_our_text_alone_is_enough_for_the_same_picture(draw, tmp_path):
    """A program that keeps `parameters` and no other entry has saved the picture."""
    picture = draw(*SMALL, "--sampler", "heun", "--exact", "--n_samples", 2, "--n_iter", 1)[1]
    (path := tmp_path / "kept").mkdir()
    text = {"parameters": Image.open(picture).text["parameters"]}
    save_png(Image.open(picture), path / "a.png", text)
    more = ["--ckpt", WEIGHTS, "--precision", "full"]
    (again,) = draw("--like", path / "a.png", *more, outdir="again")
    assert same(picture, again)


# One of a series


def test_picture_i_of_seed_s_is_picture_0_of_seed_s_plus_i(draw):
    given = [*SMALL, "--sampler", "euler_ancestral", "--exact", "--n_iter", 1]
    series = draw(*given, "--n_samples", 4, "--seed", 42)
    (third,) = draw(*given, "--n_samples", 1, "--seed", 45, outdir="a")
    assert same(series[3], third) and not same(series[2], third)
    assert "Seed: 45," in Image.open(series[3]).text["parameters"]
    alone = draw(*given, "--n_samples", 4, "--only", "3,1", outdir="b")
    assert [recipe(path)["index"] for path in alone] == [3, 1]
    assert same(alone[0], series[3]) and same(alone[1], series[1])
    (beyond,) = draw(*given, "--n_samples", 1, "--only", "7", "--seed", 38, outdir="c")
    assert same(beyond, third)


def test_only_names_a_line_of_a_file(draw, tmp_path):
    (path := tmp_path / "prompts.txt").write_text("a dog\na cat\na red car\n")
    given = [*SMALL[:-2], "--exact", "--from-file", path, "--n_iter", 2]
    (picture,) = draw(*given, "--only", 4)
    assert (recipe(picture)["prompt"], recipe(picture)["index"]) == ("a cat", 4)
    assert same(picture, draw(*given, outdir="all")[4])


@pytest.mark.usefixtures("one_thread")
def test_the_same_pixels_from_batches_of_1_and_4_and_from_two_processes(draw, tmp_path):
    given = [*SMALL, "--sampler", "dpmpp_2m_sde", "--scale", 4]
    one = draw(*given, "--n_samples", 1, "--n_iter", 4, outdir="one")
    exact = draw(*given, "--n_samples", 4, "--n_iter", 1, "--exact", outdir="exact")
    four = draw(*given, "--n_samples", 4, "--n_iter", 1, outdir="four")
    command = ["--ckpt", WEIGHTS, *given, "--n_samples", 4, "--n_iter", 1, "--exact"]
    command += ["--outdir", tmp_path / "two"]
    together(tmp_path, lambda rank: txt2img.main(list(map(str, command))), of_torchrun)
    two = sorted((tmp_path / "two/samples").glob("*"))
    assert len(one) == len(exact) == len(four) == len(two) == 4
    for a, b, c, d in zip(one, exact, four, two):
        assert same(a, b) and same(a, d)
        assert np.abs(pixels(a) - pixels(c)).max() <= 1  # another batch may round differently
        assert recipe(a) == recipe(b) == recipe(d)
    assert [path.name for path in (tmp_path / "two").glob("grid*")] == ["grid-0000.png"]
