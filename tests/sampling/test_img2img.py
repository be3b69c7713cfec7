"""img2img.py: a photo of any size, with noise, and the rest of the steps."""

import pytest
import torch
from PIL import Image

from ldm.errors import UserError
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.sampler_names import SAMPLERS, SIGMA_SAMPLERS
from ldm.rng import SampleRandom
from ldm.sampling.first_stage import encode
from ldm.sampling.image_to_image import image_to_image, steps_of
from ldm.sampling.metadata import read_recipe
from ldm.sampling.photos import read_photo, to_tensor
from ldm.sampling.pictures import to_pil
from ldm.sampling.text_to_image import Recipe, image_seed
from scripts import img2img
from tests.support.models import SMALL_UNET, build, with_own_parts
from tests.support.photos import picture

SIDE = 32


@pytest.fixture(scope="module")
def model():
    return build(SMALL_UNET).eval().requires_grad_(False)


@pytest.fixture
def command(model, monkeypatch, tmp_path):
    """Call the script with a model that is there already; its pictures, in order."""
    monkeypatch.setattr("ldm.sampling.flags.load_model", lambda *_: with_own_parts(model))
    monkeypatch.setattr(model, "image_size", SIDE // model.downsampling)
    (tmp_path / "model.ckpt").write_bytes(b"weights")

    def call(*arguments, outdir="out", status=0):
        always = ["--ckpt", tmp_path / "model.ckpt", "--outdir", tmp_path / outdir, "--steps", 4]
        always += ["--skip_grid", "--prompt", "photo of a sks dog"]
        assert img2img.main([str(value) for value in (*always, *arguments)]) == status
        return [Image.open(path) for path in sorted((tmp_path / outdir / "samples").glob("*"))]

    return call


def photo(folder, width=50, height=40, **options):
    picture(width, height).save(folder / "photo.png", **options)
    return folder / "photo.png"


def test_steps_are_rounded_down_and_never_none():
    assert [steps_of(strength, 50) for strength in (0.75, 0.8, 1.0, 0.02)] == [37, 40, 50, 1]
    for strength in (0.0, -0.5, 1.5, float("nan")):
        with pytest.raises(UserError, match="expected more than 0, and at most 1"):
            steps_of(strength, 50)
    with pytest.raises(UserError, match="of 50 steps none is left"):
        steps_of(0.01, 50)


def test_it_is_the_samplers_own_encode_and_decode(model):
    """What CompVis's notebooks do by hand."""
    recipe = Recipe(steps=4, scale=3.0, eta=0.5, height=SIDE, width=SIDE, strength=0.5)
    image = picture(SIDE, SIDE)
    (found,) = image_to_image(model, image, ["a dog"], [7], recipe)
    sampler, random = DDIMSampler(model), SampleRandom([7])
    sampler.make_schedule(4, ddim_eta=0.5, verbose=False)
    z = encode(model, to_tensor(image))
    noisy = sampler.stochastic_encode(z, torch.tensor([1]), noise=random.randn(z.shape))
    c, uc = (model.get_learned_conditioning([text]) for text in ("a dog", ""))
    z = sampler.decode(noisy, c, 2, 3.0, uc, random, verbose=False)
    assert found.tobytes() == to_pil(model.decode_first_stage(z))[0].tobytes()


@pytest.mark.parametrize("name", [*sorted({*SAMPLERS} - {"ddpm"}), *SIGMA_SAMPLERS])
def test_less_strength_leaves_more_of_the_photo(model, name):
    image = picture(SIDE, SIDE)

    def distance(strength):
        recipe = Recipe(10, 1.0, sampler=name, height=SIDE, width=SIDE, strength=strength)
        (drawn,) = image_to_image(model, image, ["a dog"], [7], recipe)
        z, x = (encode(model, to_tensor(one)) for one in (drawn, image))
        return (z - x).square().mean().item()

    assert distance(0.1) < distance(1.0)


def test_a_photo_is_encoded_once_for_all_batches(command, model, tmp_path, monkeypatch):
    path, sizes, encode_first_stage = photo(tmp_path, SIDE, SIDE), [], model.encode_first_stage

    def counted(images):
        sizes.append(tuple(images.shape))
        return encode_first_stage(images)

    monkeypatch.setattr(model, "encode_first_stage", counted)
    found = command("--init-img", path, "--strength", "0.5", "--n_samples", "1", "--n_iter", "3")
    assert len(found) == 3 and sizes == [(1, 3, SIDE, SIDE)]
    # The pixels are those of a picture that is drawn alone, whose photo is encoded for it.
    recipe = Recipe(4, 5.0, height=SIDE, width=SIDE, strength=0.5)
    image, texts = read_photo(path), ["photo of a sks dog"]
    for number, drawn in enumerate(found):
        (alone,) = image_to_image(model, image, texts, [image_seed(42, number)], recipe)
        assert alone.tobytes() == drawn.tobytes()
    assert len(sizes) == 4


def test_a_picture_of_the_series_does_not_depend_on_its_batch(command, tmp_path):
    more = ["--init-img", photo(tmp_path), "--strength", "0.5", "--exact"]
    together = command(*more, "--n_samples", "3")
    assert len({image.tobytes() for image in together}) == 3
    (second,) = command(*more, "--n_samples", "3", "--only", "1", outdir="second")
    assert second.tobytes() == together[1].tobytes()


@pytest.mark.parametrize(
    "size, drawn", [((50, 40), (40, 32)), ((32, 32), (32, 32)), ((20, 90), (32, 144)), ((9, 9), (32, 32))]
)  # fmt: skip
def test_photos_of_any_size_are_drawn_near_the_models(command, tmp_path, caplog, size, drawn):
    caplog.set_level("INFO")
    path = photo(tmp_path, *size)
    (found,) = command("--init-img", path, "--n_samples", "1")
    assert found.size == drawn
    said = [record.getMessage() for record in caplog.records if "drawn at" in record.getMessage()]
    assert len(said) == 1 and f"drawn at {drawn[0]}x{drawn[1]}" in said[0]


def test_a_turned_photo_is_upright_and_a_given_size_is_taken(command, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (upright,) = command("--init-img", photo(tmp_path, exif=exif), "--n_samples", "1")
    assert upright.size == (32, 40)
    more = ["--init-img", photo(tmp_path), "--n_samples", "1", "--W", "48", "--H", "16"]
    assert command(*more, outdir="wide")[0].size == (48, 16)


def test_a_picture_says_how_it_was_made_and_is_made_again(command, tmp_path):
    path = photo(tmp_path)
    pictures = command("--init-img", path, "--strength", "0.5", "--sampler", "Euler a")
    assert "Denoising strength: 0.5" in pictures[1].text["parameters"]
    recipe = read_recipe(pictures[1])
    assert (recipe["strength"], recipe["init_img"]) == (0.5, str(path))
    (again,) = command("--like", pictures[1].filename, outdir="again")
    assert again.tobytes() == pictures[1].tobytes()


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "--init-img: which photo?"),
        (["--init-img", ""], "--init-img: is empty"),
        (["--init-img", "{tmp}/none.jpg"], "none.jpg: cannot read this image (there is no such"),
        (["--init-img", "{tmp}/long.png"], "a photo of 900x3 pixels is too long"),
        (["--init-img", "{tmp}/photo.png", "--strength", "1.5"], "at most 1"),
        (["--init-img", "{tmp}/photo.png", "--strength", "0.1"], "of 4 steps none is left"),
        (["--init-img", "{tmp}/photo.png", "--H", "33"], "must be multiples of 4"),
    ],
)
def test_what_is_refused_is_one_line_and_leaves_no_folder(command, tmp_path, caplog, arguments, words):  # fmt: skip
    photo(tmp_path)
    Image.new("RGB", (900, 3)).save(tmp_path / "long.png")
    command(*[argument.replace("{tmp}", str(tmp_path)) for argument in arguments], status=1)
    error = caplog.records[-1].getMessage()
    assert error.startswith("error: ") and words in error and "\n" not in error
    assert not (tmp_path / "out").exists()
