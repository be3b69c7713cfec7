"""DreamBooth on a cascade, from photos to enlarged pictures, as a user runs it."""

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image, ImageChops

import main
from ldm.data.finding import list_images
from ldm.errors import UserError
from ldm.sampling.metadata import read_recipe
from scripts import cascade_txt2img
from tests.checkpoints.test_unpickle import ATTACKS
from tests.support.cascade import ENLARGING, IN_PIXELS
from tests.support.pickles import HandMade
from tests.support.runs import SMALL_UNET, Workspace, config
from tests.support.words import write_words

SIDE = 16
SIZES = [f"data.params.{name}.params.size={SIDE}" for name in ("train", "reg")]
FEW = ["--max_steps", "2", "model.params.timesteps=20", "model.params.image_size=8"]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("cascade"))


@pytest.fixture(scope="module")
def base(workspace):
    """A base model of 8 pixels that reads texts by a T5, and has drawn a class image itself."""
    width = SMALL_UNET["context_dim"]
    text = {"d_model": width, "d_kv": 8, "d_ff": 16}
    text |= {"num_layers": 1, "num_heads": 2, "vocab_size": 9}
    content = OmegaConf.load(config(workspace.path))
    content.model.params.cond_stage_trainable = False
    content.model.params.cond_stage_config = {
        "target": "ldm.modules.encoders.modules.FrozenT5Embedder",
        "params": {"text_config": text, "tokenizer": str(write_words(workspace.path))},
    }
    OmegaConf.save(content, workspace.path / "t5.yaml")
    more = ["data.params.num_class_images=5", "data.params.class_images={sampler: ddpm, steps: 20}"]
    sizes = [f"data.params.{name}.params.size=8" for name in ("train", "reg")]
    run = workspace.train("base", *IN_PIXELS, *FEW, *sizes, *more, base=workspace.path / "t5.yaml")
    return run / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def large(workspace):
    """A super-resolution model from 8 to 16 pixels, tuned with little noise."""
    more = [
        "model.params.noise_augmentation=1e-5",
        "model.params.low_scale_config.params.max_noise_level=1",
    ]
    more += [f"model.params.image_size={SIDE}"]
    run = workspace.train("sr", *ENLARGING, *FEW, *SIZES, *more)
    return run / "checkpoints" / "last.ckpt"


@pytest.fixture
def draw(tmp_path):
    """Call the command on few steps; the pictures that it has drawn."""

    def call(*flags, status=0, outdir="out"):
        quick = [] if "--like" in flags else ["--steps", "3", "--sr_steps", "2", "--n_iter", "1"]
        found = cascade_txt2img.main([*map(str, flags), *quick, "--outdir", str(tmp_path / outdir)])
        assert found == status
        return sorted((tmp_path / outdir / "samples").glob("*.png"))

    return call


def same(first, second):
    with Image.open(first) as a, Image.open(second) as b:
        return a.size == b.size and ImageChops.difference(a, b).getbbox() is None


def test_the_base_draws_its_own_class_images(workspace, base):
    drawn = [path for path in list_images(workspace.class_images) if read_recipe(path)]
    assert len(drawn) == 1 and read_recipe(drawn[0])["sampler"] == "ddpm"
    with Image.open(drawn[0]) as image:
        assert image.size == (8, 8)


def test_both_models_draw_and_a_picture_is_drawn_again(base, large, draw, tmp_path):
    models = ["--base_ckpt", base, "--sr_ckpt", large]
    made = draw(*models, "--n_samples", 2, "--save_base", "--prompt", "photo of a sks dog")
    small = sorted((tmp_path / "out/base").glob("*.png"))
    sizes = [Image.open(path).size for path in (*made, *small)]
    assert sizes == [(16, 16), (16, 16), (8, 8), (8, 8)] and not same(*made)
    assert not same(made[0], draw(*models, "--n_samples", 1, "--augmentation", 2e-5, outdir="x")[0])

    # The same picture by its file alone; the second model alone on the small picture.
    (again,) = draw("--like", made[1], outdir="again")
    assert same(made[1], again)
    enlarge = ["--sr_ckpt", large, "--init-img", small[0], "--n_samples", 1, "--skip_grid"]
    (alone,) = draw(*enlarge, "--prompt", "photo of a sks dog", outdir="alone")
    assert same(alone, made[0])
    (again,) = draw("--like", alone, outdir="alone again")
    assert same(alone, again)


def test_small_pictures_of_another_size_are_warned_of(base, large, draw, caplog):
    models = ["--base_ckpt", base, "--sr_ckpt", large, "--n_samples", 1]
    draw(*models)
    assert "is --base_ckpt the right one?" not in caplog.text
    draw(*models, "--H", 16)
    assert "are 8 x 16 pixels, and --sr_ckpt was taught 8 x 8" in caplog.text


def test_what_is_no_cascade_is_refused_in_one_line(base, large, draw, tmp_path, caplog):
    for flags, message in (
        (["--base_ckpt", base], "--sr_ckpt: which super-resolution model?"),
        (["--sr_ckpt", large], "give --base_ckpt FILE"),
        (["--base_ckpt", base, "--sr_ckpt", "no.ckpt"], "--sr_ckpt no.ckpt: no such file"),
        (["--base_ckpt", base, "--sr_ckpt", base], "no super-resolution model"),
        (["--base_ckpt", large, "--sr_ckpt", large], "enlarges a small picture"),
        (["--base_ckpt", base, "--sr_ckpt", large, "--augmentation", 0], "--augmentation 0.0: "),
        (
            ["--base_ckpt", base, "--sr_ckpt", large, "--augmentation", 0.5, "--save_base"],
            "noise augmentation: 0.5 is level",
        ),
    ):
        assert not draw(*flags, status=1)
        assert message in caplog.messages[-1]
    assert not (tmp_path / "out/base").exists()  # refused before the first small picture


@pytest.mark.parametrize(
    "name, flags, message",
    [
        ("cut.png", [], "cut.png: cannot read this image"),
        ("small.png", ["--H", 16], "--H 16: {folder}/small.png is 8x4 pixels"),
        ("small.png", ["--H", 4, "--W", 9], "--W 9: {folder}/small.png is 8x4 pixels"),
        ("small.png", ["--H", 4, "--W", 8], "no model"),
    ],
)
def test_a_picture_is_checked_before_a_model_is_loaded(
    draw, tmp_path, monkeypatch, caplog, name, flags, message
):
    def model_of(args, prompts=()):
        raise UserError("no model")

    monkeypatch.setattr(cascade_txt2img, "model_of", model_of)
    Image.new("RGB", (8, 4)).save(tmp_path / "small.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "small.png").read_bytes()[:40])
    (tmp_path / "sr.ckpt").touch()
    given = ["--sr_ckpt", tmp_path / "sr.ckpt", "--init-img", tmp_path / name]
    assert not draw(*given, *flags, status=1)
    assert message.format(folder=tmp_path) in caplog.messages[-1]


@pytest.mark.parametrize("flag", ["--base_ckpt", "--sr_ckpt"])
def test_code_in_a_file_of_weights_does_not_run(base, large, draw, flag, tmp_path):
    canary, evil = tmp_path / "canary", tmp_path / "evil.ckpt"
    torch.save({"state_dict": ATTACKS["exec"](str(canary))}, evil, pickle_module=HandMade)
    flags = {"--base_ckpt": base, "--sr_ckpt": large, flag: evil}
    assert not draw(*[word for pair in flags.items() for word in pair], status=1)
    assert not canary.exists()


@pytest.mark.parametrize("kind", [IN_PIXELS, ENLARGING])
def test_a_latent_cache_is_refused(workspace, kind, caplog):
    command = workspace.arguments("cached", *kind, *FEW, *SIZES, "data.params.latent_cache=true")
    assert main.main(command) == 1
    assert "data.params.latent_cache: a " in caplog.messages[-1]
