"""Commands read their texts before they draw, and free what then has no more to do."""

import numpy as np
import pytest
from PIL import Image

from ldm.errors import UserError
from ldm.sampling.read_ahead import read_ahead
from ldm.sampling.series import Batch, Picture
from ldm.sampling.text_to_image import Recipe, image_seed, text_to_image
from ldm.studies import drawing as of_studies
from ldm.tiny.miniature import WEIGHTS
from scripts import class_images, img2img, inpaint, txt2img
from tests.sampling.conftest import load_once
from tests.support.photos import as_numbers, picture

SIDE = 64
RECIPE = Recipe(steps=2, scale=3.0, height=SIDE, width=SIDE, seed=7)
FLAGS = ["--ckpt", WEIGHTS, "--steps", 2, "--scale", 3, "--seed", 7, "--skip_grid"]
TEXT, ENCODER = "text encoder", "autoencoder's encoder"


def freed(model):
    """What of a model has no weights any more."""
    parts = {TEXT: model.cond_stage_model, ENCODER: model.first_stage_model.encoder}
    return {name for name, part in parts.items() if not list(part.parameters())}


def commands(photo):
    """Sampling commands, what each frees."""
    photo = ["--init-img", photo]
    one = ["--n_iter", 1, "--n_samples", 1, "--prompt", "a dog"]
    return {
        "text": (txt2img, [*FLAGS, *one], {TEXT, ENCODER}),
        "weighted": (txt2img, [*FLAGS, *one, "--weighting", "a1111"], {TEXT, ENCODER}),
        "grid": (
            txt2img,
            [*FLAGS, "--x", "prompt=a dog,a cat", "--y", "scale=1,3"],
            {TEXT, ENCODER},
        ),
        "guide": (txt2img, [*FLAGS, *one, "--guide_ckpt", WEIGHTS], set()),
        "photo": (img2img, [*FLAGS, *photo, *one], {TEXT, ENCODER}),
        "part of a photo": (inpaint, [*FLAGS, *photo, *one, "--box", "8,8,40,40"], {TEXT}),
        "class": (
            class_images,
            [
                "--ckpt",
                WEIGHTS,
                "--class_word",
                "dog",
                "--num",
                2,
                "--sampler",
                "ddim",
                "--steps",
                1,
            ],
            {TEXT, ENCODER},
        ),
    }


@pytest.mark.parametrize("name", list(commands("")))
def test_commands_free_what_draws_nothing(model_once, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    picture(SIDE, SIDE).save("photo.png")
    command, arguments, expected = commands("photo.png")[name]
    assert command.main([*map(str, arguments), "--outdir", str(tmp_path / "out")]) == 0
    assert freed(model_once[0]) == expected
    assert list((tmp_path / "out").rglob("*.png"))


def test_a_command_draws_what_a_whole_model_draws(draw):
    prompts = ["a dog on the beach", "a red car"]
    for weighting in (None, "a1111"):
        flags = [] if weighting is None else ["--weighting", weighting]
        found = []
        for prompt in prompts:
            found += draw(*FLAGS[2:], *flags, "--prompt", prompt, "--n_samples", 2, "--n_iter", 1)
        recipe = Recipe(**{**vars(RECIPE), "weighting": weighting})
        model, seeds = load_once(WEIGHTS), [image_seed(RECIPE.seed, place) for place in range(2)]
        wanted = []
        for prompt in prompts:
            wanted += text_to_image(model, [prompt] * 2, seeds, recipe)
        assert np.array_equal(as_numbers(map(Image.open, found)), as_numbers(wanted))
        assert freed(model) == set()


def batches(*prompts):
    return [Batch((Picture(prompt, RECIPE),), (0,)) for prompt in prompts]


def test_a_text_that_was_not_read_ahead_is_refused():
    model = load_once(WEIGHTS)
    read_ahead(model, batches("a dog"), "full")
    text_to_image(model, ["a dog"], [0], RECIPE)
    with pytest.raises(UserError, match="text encoder was freed before the drawing"):
        text_to_image(model, ["a cat"], [0], RECIPE)


def test_texts_that_take_more_than_their_encoder_are_read_one_by_one(monkeypatch):
    model = load_once(WEIGHTS)
    size = sum(weight.nbytes for weight in model.cond_stage_model.parameters())
    one = model.get_learned_conditioning(["a dog"]).nbytes
    texts = [f"dog {number}" for number in range(2 + size // one)]
    monkeypatch.setattr(type(model.cond_stage_model), "embed", embedding_of(model))
    read_ahead(model, batches(*texts), "full")
    assert freed(model) == set()
    text_to_image(model, ["a cat"], [0], RECIPE)


def embedding_of(model):
    """Stand in for a text encoder: its result for one text, at once for any."""
    found = model.get_learned_conditioning(["a dog"])
    return lambda self, tokens: found.expand(len(tokens), -1, -1).clone()


def test_studies_free_it_too(monkeypatch, tmp_path):
    loaded = []
    monkeypatch.setattr(
        of_studies, "load_model", lambda *_, **__: loaded.append(load_once(WEIGHTS)) or loaded[-1]
    )
    wanted = of_studies.series(["a dog", "a cat"], 1, tmp_path)
    assert of_studies.draw(WEIGHTS, wanted, RECIPE) == 2
    assert freed(loaded[0]) == {TEXT, ENCODER} and len(list(tmp_path.iterdir())) == 2
