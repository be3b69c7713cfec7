"""stable_txt2img.py: from a checkpoint to pictures that carry their recipe."""

import numpy as np
import pytest
from PIL import Image

from ldm.sampling.metadata import read_recipe
from scripts import stable_txt2img
from tests.support.runs import SIZE, Workspace


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    """A checkpoint away from its run folder, so that its own config must be enough."""
    workspace = Workspace(tmp_path_factory.mktemp("sampled"))
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
        return [Image.open(path) for path in sorted((outdir / "samples").iterdir())]

    return call


def test_pictures_and_grid(sample, tmp_path):
    pictures = sample("--n_samples", "2", "--n_iter", "2")
    assert [picture.filename.rsplit("/")[-1] for picture in pictures] == [f"{n:05}.png" for n in range(4)]
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
    assert np.array_equal(np.asarray(first), before) and not np.array_equal(np.asarray(second), before)
    assert sorted(path.name for path in (tmp_path / "out").glob("grid*")) == ["grid-0000.png", "grid-0001.png"]


def as_numbers(pictures):
    return np.stack([np.asarray(picture).astype(int) for picture in pictures])


def test_a_picture_does_not_depend_on_the_batch_size(sample):
    together = as_numbers(sample("--n_samples", "3", outdir="together"))
    alone = as_numbers(sample("--n_samples", "1", "--n_iter", "3", outdir="alone"))
    assert np.abs(together - alone).max() <= 1  # matrix products of other sizes may round differently
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
    (plain,) = as_numbers(sample("--n_samples", "1", outdir="plain"))
    (negative,) = as_numbers(sample("--n_samples", "1", "--negative_prompt", "a cat", outdir="negative"))
    (other,) = as_numbers(sample("--n_samples", "1", "--prompt", "a cat", outdir="other"))
    assert np.abs(plain - negative).max() > 0 and np.abs(plain - other).max() > 0
