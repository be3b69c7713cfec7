"""What a picture's PNG file says about itself, read by others' programs and by ours."""

import hashlib
import json
from dataclasses import replace

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.models.diffusion.sampler_names import find_sampler
from ldm.sampling.infotext import parse_infotext, web_ui_schedule
from ldm.sampling.metadata import picture_texts, read_recipe
from ldm.sampling.pictures import save_png
from ldm.sampling.text_to_image import Recipe

PROMPT = "photo of a sks dog, (detailed:1.2)"
RECIPE = Recipe(steps=20, scale=7.0, width=64, height=32, seed=7, weighting="a1111")
SHA256 = hashlib.sha256(b"weights").hexdigest()


@pytest.fixture
def saved(tmp_path):
    """Save a picture with the texts of a prompt; its path."""

    def call(prompt=PROMPT, *arguments, recipe=RECIPE, **more):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.png"
        save_png(
            Image.new("RGB", (64, 32)), path, picture_texts(prompt, recipe, *arguments, **more)
        )
        return path

    return call


def text(path):
    return Image.open(path).text["parameters"]


def test_the_text_is_that_of_the_web_ui(saved):
    path = saved(PROMPT, "blurry, dark", model="my-dog", model_sha256=SHA256)
    fields = (
        "Steps: 20, Sampler: DDIM, Schedule type: Automatic, CFG scale: 7, Seed: 7, Size: 64x32"
    )
    fields += f", Model hash: {SHA256[:10]}, Model: my-dog"
    assert text(path) == f"{PROMPT}\nNegative prompt: blurry, dark\n{fields}"


def test_what_is_not_known_is_left_out(saved):
    assert text(saved("", recipe=Recipe())).startswith("Steps: 50, Sampler: DDIM")
    assert "Negative prompt" not in text(saved()) and "Model" not in text(saved())
    assert text(saved("a dog", recipe=Recipe(eta=0.5))).endswith(", Eta DDIM: 0.5")


def test_brackets_that_were_drawn_as_words_are_no_emphasis_to_the_web_ui(saved):
    assert text(saved("a (red) dog", recipe=Recipe())).endswith(", Emphasis: None")
    assert "Emphasis" not in text(saved("a (red) dog", recipe=Recipe(weighting="a1111")))


@pytest.mark.parametrize(
    "prompt", [PROMPT, "two\nlines", "un chien, été", "犬の写真", "", 'a "quoted" word: yes']
)
@pytest.mark.parametrize("negative", ["", "blurry: very, dark"])
def test_a_parser_of_others_reads_it(saved, prompt, negative):
    sd_parsers = pytest.importorskip("sd_parsers")
    path = saved(prompt, negative, model="my-dog", model_sha256=SHA256, index=3)
    found = sd_parsers.ParserManager().parse(path)
    (sampler,) = found.samplers
    assert found.generator.value == "AUTOMATIC1111"
    assert [prompt.value for prompt in sampler.prompts] == ([prompt] if prompt else [])
    assert [prompt.value for prompt in sampler.negative_prompts] == ([negative] if negative else [])
    assert (sampler.name, sampler.model.name, sampler.model.hash) == ("DDIM", "my-dog", SHA256[:10])
    parameters = {"cfg_scale": "7", "seed": "10", "steps": "20", "scheduler": "Automatic"}
    assert sampler.parameters == parameters
    assert found.metadata == {"Size": "64x32"}


@pytest.mark.parametrize(
    "sampler, schedule, names",
    [
        ("dpmpp_2m", "karras", ("DPM++ 2M", "Karras")),
        ("euler_ancestral", "normal", ("Euler a", "Normal")),
        ("dpmpp_2s_ancestral", "sgm_uniform", ("DPM++ 2S a", "SGM Uniform")),
        ("uni_pc", "align_your_steps", ("UniPC", "Align Your Steps")),
    ],
)
def test_a_parser_of_others_reads_samplers_and_schedules(saved, sampler, schedule, names):
    """Read back by ours, they are what they were."""
    sd_parsers = pytest.importorskip("sd_parsers")
    recipe = replace(RECIPE, sampler=sampler, schedule=schedule, scale=1 / 3)
    path = saved(PROMPT, "dark", recipe=recipe)
    (found,) = sd_parsers.ParserManager().parse(path).samplers
    assert (found.name, found.parameters["scheduler"]) == names
    assert float(found.parameters["cfg_scale"]) == pytest.approx(1 / 3)
    prompt, negative, fields = parse_infotext(text(path))
    assert (prompt, negative) == (PROMPT, "dark")
    plain, _ = find_sampler(fields["Sampler"])
    read = find_sampler(fields["Sampler"], web_ui_schedule(plain, fields["Schedule type"]))
    assert read == (sampler, schedule)


@pytest.mark.parametrize(
    "given, prompts",
    [
        ("a dog\nSteps: 20, Sampler: DDIM", ("a dog", "")),
        ("Negative prompt: dark\nSteps: 20", ("", "dark")),
        ("Steps: 20", ("", "")),
        ("two\nlines\nNegative prompt: a,\nb\nSteps: 20, Size: 8x8", ("two\nlines", "a,\nb")),
    ],
)
def test_texts_of_the_web_ui_are_taken_apart(given, prompts):
    assert parse_infotext(given)[:2] == prompts
    assert parse_infotext(given)[2]["Steps"] == "20"


def test_other_texts_are_none_of_the_web_ui(saved):
    assert parse_infotext("") is None and parse_infotext("a dog\nSize: 8x8") is None
    model = 'my "dog", v1: x'
    assert parse_infotext(text(saved(model=model)))[2]["Model"] == model


def test_our_own_entry_holds_everything(saved):
    found = read_recipe(saved("犬", "dark", index=3, ckpt="a/b.ckpt"))
    assert (found["prompt"], found["negative_prompt"], found["index"], found["ckpt"]) == (
        "犬",
        "dark",
        3,
        "a/b.ckpt",
    )
    assert (found["seed"], found["width"], found["height"], found["sampler"]) == (7, 64, 32, "ddim")


def test_older_pictures_of_ours_are_read(tmp_path):
    """They have the JSON where other programs look for their text."""
    info = PngInfo()
    info.add_itxt("parameters", json.dumps({"prompt": "photo of a dog", "seed": 1, "index": 4}))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    assert read_recipe(tmp_path / "a.png") == {"prompt": "photo of a dog", "seed": 1, "index": 4}


@pytest.mark.parametrize(
    "texts", [{}, {"parameters": "a dog\nSteps: 20"}, {"dreambooth": "[1]"}, {"parameters": "3"}]
)
def test_pictures_of_others_have_no_recipe(tmp_path, texts):
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", texts)
    assert read_recipe(tmp_path / "a.png") is None
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    assert read_recipe(tmp_path / "a.jpg") is None
