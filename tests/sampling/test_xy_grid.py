"""Grids over two flags: the single pictures, the labelled sheet, and what is refused."""

import shutil

import pytest
from PIL import Image

from ldm.sampling.metadata import read_recipe
from ldm.tiny.miniature import WEIGHTS

SMALL = ["--H", 32, "--W", 32, "--steps", 2, "--prompt", "a red car"]


@pytest.fixture
def grid(draw):
    """Draw a grid; the recipes of its pictures."""

    def call(*arguments, **more):
        return [read_recipe(path) for path in draw(*SMALL, *arguments, **more)]

    return call


def test_two_flags_vary(grid, tmp_path):
    found = grid("--x", "scale=1,4.5", "--y", "sampler=ddim, DPM++ 2M Karras,", status=1)
    assert found == []  # a comma too many
    (tmp_path / "out").mkdir()
    command = ["--x", "scale=1,4.5", "--y", "sampler=ddim, DPM++ 2M Karras", "--seed", 7]
    found = grid(*command)
    assert [(recipe["sampler"], recipe["schedule"], recipe["scale"]) for recipe in found] == [
        ("ddim", None, 1.0),
        ("ddim", None, 4.5),
        ("dpmpp_2m", "karras", 1.0),
        ("dpmpp_2m", "karras", 4.5),
    ]
    assert {(recipe["prompt"], recipe["seed"], recipe["index"]) for recipe in found} == {
        ("a red car", 7, 0)
    }


def test_prompts_in_quotation_marks_and_checkpoints(grid, tmp_path):
    """Each checkpoint is named on the sheet, and in the metadata of its pictures."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copy(WEIGHTS, tmp_path / name / "last.safetensors")
    checkpoints = [str(tmp_path / name / "last.safetensors") for name in ("a", "b")]
    prompts = ["a red car, old", "a dog"]
    found = grid(
        "--x", f'prompt="{prompts[0]}",{prompts[1]}', "--y", f"ckpt={','.join(checkpoints)}"
    )
    assert [(recipe["ckpt"], recipe["prompt"]) for recipe in found] == [
        (checkpoint, prompt) for checkpoint in checkpoints for prompt in prompts
    ]


def test_the_sheet_has_a_cell_for_each_pair(draw, tmp_path):
    draw("--like", draw(*SMALL, "--only", 2)[0], "--x", "scale=1,2,3", outdir="sheet")
    (path,) = (tmp_path / "sheet").glob("xy-*")
    sheet = Image.open(path)
    assert path.name == "xy-0000.png" and 3 * 128 < sheet.width < 4 * 128
    recipes = [read_recipe(p) for p in sorted((tmp_path / "sheet/samples").glob("*"))]
    assert [(recipe["scale"], recipe["index"]) for recipe in recipes] == [(1, 2), (2, 2), (3, 2)]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--x", "scal=1,2"], "'scal' cannot vary (did you mean 'scale'?)"),
        (["--x", "outdir=a,b"], "'outdir' cannot vary"),
        (["--x", "scale"], "expected values with commas between them"),
        (["--x", "scale=1,two"], "scale is a number"),
        (["--x", "interval=1,2"], "'interval' cannot vary"),
        (["--x", "weighting=a1111,compel"], "accepted: a1111"),
        (["--x", "scale=1,1"], "a value is there twice"),
        (["--x", "scale=4,4.0"], "a value is there twice"),
        (["--x", "steps=1,2.5"], "steps is a whole number"),
        (["--x", f"ckpt={WEIGHTS},gone.ckpt"], "gone.ckpt: no such checkpoint"),
        (["--x", ""], "--x: is empty"),
        (["--x", "steps=1,0"], "--ddim_steps 0: expected at least 1"),
        (["--x", "cfg=1,2", "--y", "scale=1,2"], "both are scale"),
        (["--y", "sampler=ddim,eulr"], "unknown 'eulr' (did you mean 'euler'?)"),
        (["--x", "scale=1,2", "--suite", "art", "--subject", "sks dog"], "leave --suite out"),
        (["--x", "scale=1,2", "--only", "1,2"], "draws one picture of the series"),
    ],
)
def test_what_is_refused(draw, tmp_path, caplog, arguments, words):
    assert draw(*SMALL, *arguments, status=1) == []
    assert words in caplog.records[-1].getMessage()
    assert not (tmp_path / "out").exists()


# Suites of prompts


def test_a_suite_is_drawn_of_a_subject(draw, caplog):
    flags = [*SMALL, "--suite", "tiny/class", "--n_iter", 1]
    (third,) = draw(*flags, "--subject", "sks robot", "--only", 2)
    assert "robot" in read_recipe(third)["prompt"] and read_recipe(third)["index"] == 2
    assert draw(*flags, "--subject", "robot", status=1) == []
    assert "as 'sks dog'" in caplog.records[-1].getMessage()
    assert draw(*SMALL, "--suite", "arts", "--subject", "sks dog", status=1) == []
    assert "did you mean 'art'?" in caplog.records[-1].getMessage()
