"""stable_txt2img.py: from a checkpoint to pictures that carry their recipe."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ldm.checkpoints.checkpoint import Checkpoint
from ldm.sampling import drawing, pictures
from ldm.sampling.metadata import read_recipe
from ldm.sampling.pictures import next_number, save_numbered, save_png
from ldm.sampling.text_to_image import Recipe, load_model, text_to_image
from scripts import stable_txt2img, txt2img
from tests.support.photos import as_numbers
from tests.support.runs import SIZE, Workspace, golden_config


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    """A checkpoint away from its run folder, so that its own config must be enough."""
    workspace = Workspace(tmp_path_factory.mktemp("sampled"), make_config=golden_config)
    run = workspace.train("sampled", "--max_steps", "2")
    (run / "checkpoints/last.ckpt").rename(path := workspace.path / "model.ckpt")
    return path


@pytest.fixture
def sample(ckpt, tmp_path):
    """Call the script; the pictures in its folder, in order."""

    def call(*arguments, outdir="out"):
        outdir = tmp_path / outdir
        always = [
            "--ckpt",
            str(ckpt),
            "--outdir",
            str(outdir),
            "--prompt",
            "photo of a sks dog",
            "--ddim_steps",
            "2",
            "--n_iter",
            "1",
        ]
        assert stable_txt2img.main([*always, *arguments]) == 0
        return [Image.open(path) for path in sorted((outdir / "samples").glob("*"))]

    return call


def test_pictures_and_grid(sample, tmp_path):
    pictures = sample("--n_samples", "2", "--n_iter", "2")
    assert [picture.filename.rsplit("/")[-1] for picture in pictures] == [
        f"{n:05}.png" for n in range(4)
    ]
    assert {picture.size for picture in pictures} == {(SIZE, SIZE)}
    grid = Image.open(tmp_path / "out" / "grid-0000.png")
    assert grid.width > 2 * SIZE and grid.height > 2 * SIZE


def test_pictures_carry_their_recipe(sample):
    (picture,) = sample("--n_samples", "1", "--seed", "7", "--scale", "3", "--ddim_eta", "0.5")
    recipe = read_recipe(picture)
    assert recipe["prompt"] == "photo of a sks dog"
    assert (recipe["seed"], recipe["scale"], recipe["eta"], recipe["steps"]) == (7, 3.0, 0.5, 2)
    assert (recipe["sampler"], recipe["width"], recipe["index"]) == ("ddim", SIZE, 0)


def test_nothing_is_overwritten(sample, tmp_path):
    (first,) = sample("--n_samples", "1")
    before = np.asarray(first)
    first, second = sample("--n_samples", "1", "--seed", "8")
    assert np.array_equal(np.asarray(first), before) and not np.array_equal(
        np.asarray(second), before
    )
    assert sorted(path.name for path in (tmp_path / "out").glob("grid*")) == [
        "grid-0000.png",
        "grid-0001.png",
    ]


def test_a_picture_does_not_depend_on_the_batch_size(sample):
    together = as_numbers(sample("--n_samples", "3", outdir="together"))
    alone = as_numbers(sample("--n_samples", "1", "--n_iter", "3", outdir="alone"))
    assert (
        np.abs(together - alone).max() <= 1
    )  # matrix products of other sizes may round differently
    assert np.abs(together[0] - together[1]).max() > 10


def test_fixed_code_repeats_the_noise(sample):
    first, second = as_numbers(sample("--n_samples", "1", "--n_iter", "2", "--fixed_code"))
    assert np.array_equal(first, second)


def test_prompts_from_a_file(sample, tmp_path):
    (path := tmp_path / "prompts.txt").write_text("a red dog\n\na blue dog\nan old dog\n")
    pictures = sample("--from-file", str(path), "--n_samples", "2")
    assert [read_recipe(p)["prompt"] for p in pictures] == ["a red dog", "a blue dog", "an old dog"]


def test_plms_sizes_and_skipping(sample, tmp_path):
    (picture,) = sample("--plms", "--n_samples", "1", "--H", "16", "--W", "48", "--skip_grid")
    assert picture.size == (48, 16)
    assert read_recipe(picture)["sampler"] == "plms"
    assert not list((tmp_path / "out").glob("grid*"))
    assert sample("--n_samples", "1", "--skip_save", outdir="other") == []
    assert (tmp_path / "other" / "grid-0000.png").exists()


def test_the_prompt_and_the_negative_prompt_count(sample):
    """After two steps of training a prompt moves few pixels, of which a larger picture has more."""
    one = ["--n_samples", "1", "--H", "32", "--W", "32"]
    (plain,) = as_numbers(sample(*one, outdir="plain"))
    (negative,) = as_numbers(sample(*one, "--negative_prompt", "a cat", outdir="negative"))
    (other,) = as_numbers(sample(*one, "--prompt", "a cat", outdir="other"))
    assert np.abs(plain - negative).max() > 0 and np.abs(plain - other).max() > 0


# prompt files


def test_comments_and_empty_lines_are_no_prompts(sample, tmp_path, caplog):
    caplog.set_level("INFO")
    (path := tmp_path / "prompts.txt").write_bytes(
        "\ufeff# dogs\r\na red dog\r\n\r\n  # more\na blue dog\nan old dög".encode()
    )
    pictures = sample("--from-file", str(path), "--n_samples", "2")
    assert [read_recipe(picture)["prompt"] for picture in pictures] == [
        "a red dog",
        "a blue dog",
        "an old dög",
    ]
    assert f"{path}: 3 prompts (2 comments left out) in batches of 2, the last of 1" in caplog.text
    assert "each prompt is drawn 1 times, as --n_iter says" in caplog.text


def test_a_long_prompt_is_warned_of_with_what_is_lost(sample, caplog):
    sample(
        "--n_samples",
        "1",
        "--prompt",
        "a very long description " * 30 + "of a sks dog on the beach",
    )
    (warning,) = [
        record.getMessage() for record in caplog.records if "is cut" in record.getMessage()
    ]
    assert warning.endswith("a very long description of a sks dog on the beach'")


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--from-file", "{tmp}/prompts.txt"], "--prompt: not read: --from-file gives the prompts"),
        (["--suite", "art", "--subject", "sks dog", "--only", "0"], "--prompt: not read: --suite"),
        (["--negative_prompt", "bad", "--scale", "1"], "--negative_prompt: without effect"),
        (
            ["--embedding_path", "{tmp}/my-dog.safetensors"],
            "{tmp}/my-dog.safetensors: without effect: no prompt has 'my-dog'",
        ),
    ],
)
def test_what_has_no_effect_is_said(sample, tmp_path, caplog, arguments, said):
    (tmp_path / "prompts.txt").write_text("a my-dog\n")
    save_file({"emb_params": torch.ones(1, 32)}, tmp_path / "my-dog.safetensors")
    filled = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    sample("--n_samples", "1", *filled)
    assert said.replace("{tmp}", str(tmp_path)) in caplog.text
    caplog.clear()
    # All of these have an effect together, but for the prompt itself.
    embedding = ["--embedding_path", str(tmp_path / "my-dog.safetensors")]
    sample("--n_samples", "1", *embedding, "--prompt", "a My-Dog", "--negative_prompt", "bad")
    assert "without effect" not in caplog.text and "not read" not in caplog.text


OUT_OF_MEMORY = {
    "GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
    "CPU": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 4 bytes"),
}


@pytest.mark.parametrize("where", OUT_OF_MEMORY)
def test_too_little_memory_is_one_line_that_says_what_needs_less(
    ckpt, tmp_path, monkeypatch, caplog, where
):
    def fails(*_args, **_options):
        raise OUT_OF_MEMORY[where]

    monkeypatch.setattr(drawing, "draw_shares", fails)
    assert stable_txt2img.main(["--ckpt", str(ckpt), "--outdir", str(tmp_path / "out")]) == 1
    error = caplog.records[-1].getMessage()
    assert error.startswith("error: out of memory: ") and "to need less: --n_samples 1" in error
    assert "\n" not in error


# seeds and places


def test_a_seed_at_random_is_said_and_kept(sample, caplog):
    caplog.set_level("INFO")
    first, second = (sample("--n_samples", "1", "--seed", "-1", outdir=name)[0] for name in "ab")
    seeds = [read_recipe(picture)["seed"] for picture in (first, second)]
    assert seeds[0] != seeds[1] and min(seeds) >= 0
    assert all(f"--seed -1: the seed is {seed}" in caplog.text for seed in seeds)
    (again,) = sample("--n_samples", "1", "--seed", str(seeds[0]), outdir="c")
    assert np.array_equal(np.asarray(first), np.asarray(again))


@pytest.mark.parametrize("outdir", ["out.v1", "a.png", "deep/er/my.dog.samples"])
def test_folders_with_a_dot(sample, tmp_path, outdir):
    assert len(sample("--n_samples", "1", outdir=outdir)) == 1
    assert (tmp_path / outdir / "grid-0000.png").exists()


def test_numbers_go_on_behind_whatever_has_one(sample, tmp_path):
    (tmp_path / "out" / "samples").mkdir(parents=True)
    for name in ("00004.txt", ".00090.png.77.tmp", "IMG_2024.txt"):
        (tmp_path / "out" / "samples" / name).touch()
    assert next_number(tmp_path / "out" / "samples") == 5


def test_a_number_that_another_command_takes_meanwhile_is_left_to_it(tmp_path, monkeypatch):
    (tmp_path / "00000.png").write_text("another command's")
    free = iter([0, 0, 1])
    monkeypatch.setattr(pictures, "next_number", lambda *_: next(free))
    assert save_numbered(Image.new("RGB", (8, 8)), tmp_path).name == "00001.png"
    with pytest.raises(ValueError, match=r"00000\.png: is there already"):
        save_png(Image.new("RGB", (8, 8)), tmp_path / "00000.png")
    assert (tmp_path / "00000.png").read_text() == "another command's"
    assert len(list(tmp_path.iterdir())) == 2


# what is refused


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--H", "0"], "--H 0"),
        (["--W", "-32"], "--W -32"),
        (["--W", "33"], "multiples of"),
        (["--n_iter", "0"], "--n_iter must be at least 1"),
        (["--n_samples", "-1"], "--n_samples and"),
        (["--ddim_steps", "0"], "--ddim_steps 0"),
        (["--ddim_steps", "-5"], "--ddim_steps -5"),
        (["--ddim_steps", "1001"], "between 1 and 1000"),
        (["--scale", "inf"], "must be numbers"),
        (["--ddim_eta", "nan"], "must be numbers"),
        (["--ddim_eta", "-0.5"], "from 0 to 1"),
        (["--ddim_eta", "2"], "from 0 to 1"),
        (["--from-file", "{tmp}/comments.txt"], "no prompts in it"),
        (["--from-file", "{tmp}/latin.txt"], "latin.txt: cannot read this file of prompts"),
        (["--from-file", "{tmp}/zeros.txt"], "zero bytes in it"),
        (["--from-file", "{tmp}"], "no such file"),
        (["--from-file", ""], "--from-file: is empty"),
        (["--like", ""], "--like: is empty"),
        (["--subject", "sks dog"], "--subject 'sks dog': is for --suite, which is not given"),
        (["--outdir=~/out"], "'~' is not replaced here; write /"),
        (["--from-file", "{tmp}/comments.txt", "--suite", "art"], "--suite and --from-file: both"),
    ],
)
def test_what_is_refused_leaves_no_folder(ckpt, tmp_path, caplog, arguments, words):
    (tmp_path / "comments.txt").write_text("# a\n\n  #b\n")
    (tmp_path / "latin.txt").write_bytes("ein Hündchen".encode("latin-1"))
    (tmp_path / "zeros.txt").write_bytes("a dog".encode("utf-16-le"))
    arguments = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    always = [
        "--ckpt",
        str(ckpt),
        "--outdir",
        str(tmp_path / "out"),
        "--n_iter",
        "1",
        "--n_samples",
        "1",
    ]
    assert stable_txt2img.main([*always, *arguments]) == 1
    error = caplog.records[-1].getMessage()
    assert error.startswith("error: ") and words in error and "\n" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("inside", ["", "/out", "/deep/er"])
def test_a_file_in_place_of_the_folder_is_refused_before_the_model_is_read(
    tmp_path, caplog, inside
):
    (tmp_path / "file").touch()
    arguments = ["--ckpt", str(tmp_path / "none.ckpt"), "--outdir", f"{tmp_path / 'file'}{inside}"]
    assert stable_txt2img.main(arguments) == 1
    assert f"{tmp_path / 'file'}: a file stands where a folder is needed" in caplog.text


def test_values_that_are_no_numbers_are_no_picture(ckpt):
    model = load_model(ckpt)
    torch.nn.init.constant_(model.first_stage_model.post_quant_conv.bias, float("nan"))
    with pytest.raises(ValueError, match="values that are no numbers"):
        text_to_image(model, ["a dog"], [0], Recipe(2, height=SIZE, width=SIZE))
    (black,) = text_to_image(
        model, ["a dog"], [0], Recipe(2, height=SIZE, width=SIZE), may_fail=True
    )
    assert black.getbbox() is None


def test_guidance_and_weighting_are_recorded_and_drawn_again(sample, ckpt, tmp_path):
    (plain,) = sample("--n_samples", "1")
    # A model that guides itself is classifier-free guidance, whose negative prompt it reads. Its
    # file need not say its config.
    bare = tmp_path / "base.safetensors"
    save_file(Checkpoint.open(ckpt).state, bare)
    (itself,) = sample("--n_samples", "1", "--guide_ckpt", str(bare), outdir="itself")
    assert np.abs(as_numbers([plain]) - as_numbers([itself])).max() <= 1
    given = {
        "rescale": ["0.7"],
        "interval": ["0.1", "9"],
        "apg": ["0.5", "1"],
        "guide_ckpt": [str(ckpt)],
        "weighting": ["a1111"],
    }
    for name, values in given.items():
        words = [f"--{name}", *values, "--prompt", "photo of a (sks:1.9) dog"]
        (picture,) = sample("--n_samples", "1", *words, outdir=name)
        assert read_recipe(picture)[name] not in (None, 0.0)
        assert (tmp_path / "like" / name).mkdir(parents=True) is None
        arguments = ["--like", picture.filename, "--outdir", str(tmp_path / "like" / name)]
        assert txt2img.main(arguments) == 0
        (again,) = (tmp_path / "like" / name / "samples").glob("*")
        assert np.array_equal(as_numbers([picture]), as_numbers([Image.open(again)]))


# stopped


def test_a_stop_keeps_the_pictures_that_are_finished(sample, tmp_path, monkeypatch, capsys):
    draw, batches = drawing.text_to_image, []

    def stopped(*arguments, **options):
        batches.append(arguments)
        if len(batches) == 2:
            raise KeyboardInterrupt
        return draw(*arguments, **options)

    monkeypatch.setattr(drawing, "text_to_image", stopped)
    with pytest.raises(AssertionError):
        sample("--n_samples", "2", "--n_iter", "3")
    kept = sorted((tmp_path / "out" / "samples").iterdir())
    assert [path.name for path in kept] == ["00000.png", "00001.png"]
    for path in kept:
        Image.open(path).load()
    assert f"2 pictures in {tmp_path / 'out' / 'samples'}" in capsys.readouterr().out


def test_a_stop_while_a_picture_is_written_leaves_none_of_it(sample, tmp_path, monkeypatch):
    save = Image.Image.save

    def stopped(image, path, *arguments, **options):
        save(image, path, *arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", stopped)
    with pytest.raises(AssertionError):
        sample("--n_samples", "1")
    assert not list((tmp_path / "out" / "samples").iterdir())


def test_a_sampler_is_chosen_by_its_name_elsewhere(tmp_path, caplog):
    """The picture's text names it as the web UI does; an unknown one is refused before anything."""
    out = tmp_path / "out"
    more = [
        "--H",
        "64",
        "--W",
        "64",
        "--n_iter",
        "1",
        "--n_samples",
        "1",
        "--steps",
        "3",
        "--skip_grid",
    ]
    command = ["--ckpt", "models/tiny/sd-tiny.safetensors", "--outdir", str(out), *more]
    assert stable_txt2img.main([*command, "--sampler", "DPM++ 2M Karras"]) == 0
    with Image.open(out / "samples" / "00000.png") as picture:
        assert "Sampler: DPM++ 2M, Schedule type: Karras" in picture.text["parameters"]
    assert stable_txt2img.main([*command, "--sampler", "dpmpp_2n"]) == 1
    assert "unknown 'dpmpp_2n' (did you mean 'dpmpp_2m'?)" in caplog.text
    assert stable_txt2img.main([*command, "--sampler", "euler", "--ddim_eta", "1"]) == 1
    assert stable_txt2img.main([*command, "--plms", "--sampler", "euler"]) == 1
    assert len(list((out / "samples").iterdir())) == 1
