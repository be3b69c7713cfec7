"""inpaint.py: a part of a photo is drawn anew, and of the rest not a bit changes."""

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.checkpoints.pipeline_folder import save_pipeline
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.sampler_names import SAMPLERS, SIGMA_SAMPLERS
from ldm.rng import SampleRandom
from ldm.sampling.inpainting import inpaint
from ldm.sampling.metadata import read_recipe
from ldm.sampling.text_to_image import Recipe
from scripts import inpaint as script
from tests.support import golden
from tests.support.families import params
from tests.support.models import SMALL_UNET, build, with_own_parts
from tests.support.photos import picture

SIDE = 32
BOX = (20, 10, 44, 34)  # of the mask
HOW = Recipe(steps=3, scale=3.0, height=SIDE, width=SIDE, strength=1.0, mask_blur=2)


@pytest.fixture(scope="module")
def plain():
    return build(SMALL_UNET).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def native():
    unet = {**SMALL_UNET, "in_channels": 9}
    return build(unet, conditioning_key="hybrid").eval().requires_grad_(False)


def masked(size=(70, 50), box=BOX):
    mask = Image.new("L", size, 0)
    mask.paste(255, box)
    return mask


def differs(first, second):
    return (np.asarray(first) != np.asarray(second)).any(axis=-1)


@pytest.mark.parametrize("kind", ["plain", "native"])
@pytest.mark.parametrize("strength", [1.0, 0.4])
@pytest.mark.parametrize("size", [(70, 50), (20, 20), (24, 90)])
def test_outside_the_mask_nothing_changes(request, kind, strength, size):
    model, photo = request.getfixturevalue(kind), picture(*size)
    box = (4, 4, 16, 16) if min(size) < 40 else BOX
    recipe = Recipe(**{**vars(HOW), "strength": strength})
    results = inpaint(model, photo, masked(size, box), ["a dog"] * 2, [1, 2], recipe, padding=2)
    inside = np.asarray(masked(size, box)) > 0
    for result in results:
        assert result.size == photo.size and result.mode == "RGB"
        changed = differs(result, photo)
        assert not changed[~inside].any()
        assert changed[inside].mean() > 0.5
    assert differs(*results)[inside].any()


@pytest.mark.parametrize("name", [*sorted({*SAMPLERS} - {"ddpm"}), *SIGMA_SAMPLERS])
def test_any_sampler_keeps_what_is_not_masked(plain, name, monkeypatch):
    """What the decoder gets has the photo's own latent there."""
    seen = []
    monkeypatch.setattr(
        "ldm.sampling.inpainting.pictures_of", lambda model, z: seen.append(z) or []
    )
    recipe = Recipe(**{**vars(HOW), "sampler": name, "scale": 1.0, "steps": 4})
    photo, mask = picture(SIDE, SIDE), masked((SIDE, SIDE), (0, 0, 16, SIDE))
    inpaint(plain, photo, mask, ["a dog"], [1], recipe)
    inpaint(plain, photo, masked((SIDE, SIDE), (0, 0, 1, 1)), ["a dog"], [1], recipe)
    half = seen[0].shape[-1] // 2
    assert torch.equal(seen[0][..., half:], seen[1][..., half:])
    assert not torch.allclose(seen[0][..., :half], seen[1][..., :half], atol=0.1)


def test_the_model_fills_in_what_fits_the_photo(plain):
    """The mask's inside depends on what is outside of it: it is not drawn alone and pasted."""
    mask = masked((SIDE, SIDE), (8, 8, 24, 24))
    first = picture(SIDE, SIDE)
    other = Image.fromarray(np.where(np.asarray(mask)[..., None] > 0, np.asarray(first), 255))
    recipe = Recipe(**{**vars(HOW), "mask_blur": 0})
    (one,), (two,) = (inpaint(plain, photo, mask, ["a dog"], [1], recipe) for photo in (first, other))  # fmt: skip
    assert differs(one, two)[8:24, 8:24].mean() > 0.5


def border_steps(pixels, inside):
    """The differences of neighbours that the mask's border parts."""
    found = []
    for axis in (0, 1):
        across = np.diff(inside.astype(int), axis=axis) != 0
        found.append(np.abs(np.diff(pixels.astype(int), axis=axis)).mean(axis=-1)[across])
    return np.concatenate(found).mean()


@pytest.mark.parametrize("kind", ["plain", "native"])
def test_no_seam_at_the_masks_border(request, kind):
    model, photo, mask = request.getfixturevalue(kind), picture(70, 50), masked()
    inside = np.asarray(mask) > 0
    hard, soft = (
        border_steps(np.asarray(inpaint(model, photo, mask, ["a dog"], [1], recipe)[0]), inside)
        for recipe in (Recipe(**{**vars(HOW), "mask_blur": blur}) for blur in (0, 8))
    )
    own = border_steps(np.asarray(photo), inside)
    assert soft < 0.5 * hard and soft < own + 0.15 * (hard - own)


def test_a_native_model_draws_what_diffusers_does(tmp_path):
    """The same noise, image and mask; at the model's own size, without a soft border."""
    diffusers = pytest.importorskip("diffusers")
    config = params("v1-inpainting")
    model = LatentDiffusion(**config)
    golden.load_golden_weights(model)
    with torch.no_grad():  # diffusers samples the posterior, and we take its mode: no spread, both
        model.first_stage_model.quant_conv.weight[4:] = 0
        model.first_stage_model.quant_conv.bias[4:] = -30
    model = model.eval().requires_grad_(False)
    save_pipeline(model, config, tmp_path / "pipeline")
    theirs = diffusers.StableDiffusionInpaintPipeline.from_pretrained(tmp_path / "pipeline")
    theirs.set_progress_bar_config(disable=True)

    side = 8 * model.downsampling
    photo, mask = picture(side, side), masked((side, side), (4, 6, side - 5, side - 2))
    recipe = Recipe(5, 4.0, height=side, width=side, strength=1.0, mask_blur=0)
    (ours,) = inpaint(model, photo, mask, ["a dog"], [3], recipe)
    expected = theirs(
        "a dog", image=photo, mask_image=mask, height=side, width=side, strength=1.0,
        num_inference_steps=5, guidance_scale=4.0, output_type="np",
        latents=SampleRandom([3]).randn((1, 4, 8, 8)),
    ).images[0]  # fmt: skip
    inside = np.asarray(mask) > 0
    found = np.asarray(ours)[inside].astype(int)
    assert np.abs(found - 255 * expected[inside]).max() <= 1.5


@pytest.fixture
def command(plain, monkeypatch, tmp_path):
    """Call the script with a model that is there already; its pictures, in order."""
    monkeypatch.setattr("ldm.sampling.flags.load_model", lambda *_: with_own_parts(plain))
    monkeypatch.setattr(plain, "image_size", SIDE // plain.downsampling)
    (tmp_path / "model.ckpt").write_bytes(b"weights")
    picture(70, 50).save(tmp_path / "photo.png")
    masked().save(tmp_path / "mask.png")
    Image.new("L", (50, 70), 255).save(tmp_path / "turned.png")
    Image.new("L", (70, 50), 0).save(tmp_path / "black.png")

    def call(*arguments, outdir="out", status=0):
        always = ["--ckpt", "{tmp}/model.ckpt", "--outdir", f"{{tmp}}/{outdir}", "--steps", "2"]
        always += ["--init-img", "{tmp}/photo.png", "--skip_grid", "--prompt", "a dog"]
        arguments = [value.replace("{tmp}", str(tmp_path)) for value in (*always, *arguments)]
        assert script.main(arguments) == status
        return [Image.open(path) for path in sorted((tmp_path / outdir / "samples").glob("*"))]

    return call


def test_a_mask_and_its_box_are_the_same(command, tmp_path):
    by_mask = command("--mask", "{tmp}/mask.png")
    by_box = command("--box", "20,10,24,24", outdir="box")
    assert [image.tobytes() for image in by_mask] == [image.tobytes() for image in by_box]
    assert len(by_mask) == 2 and by_mask[0].size == (70, 50)


def test_a_picture_says_how_it_was_made_and_is_made_again(command, tmp_path):
    pictures = command("--box", "20,10,24,24", "--strength", "0.5", "--mask_blur", "3")
    text = pictures[1].text["parameters"]
    assert "Denoising strength: 0.5" in text and "Mask blur: 3" in text
    recipe = read_recipe(pictures[1])
    assert (recipe["box"], recipe["padding"], recipe["mask_blur"]) == ([20, 10, 24, 24], 32, 3)
    (again,) = command("--like", pictures[1].filename, outdir="again")
    assert again.tobytes() == pictures[1].tobytes()


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "--mask, --box: give one of the two"),
        (["--mask", "{tmp}/mask.png", "--box", "1,1,2,2"], "--mask, --box: give one of the two"),
        (["--box", "60,10,24,24"], "--box 60,10,24,24: is not inside the photo of 70x50 pixels"),
        (["--mask", "{tmp}/turned.png"], "is 50x70, its image photo.png 70x50 pixels"),
        (["--mask", "{tmp}/black.png"], "this mask is all black"),
        (["--mask", "{tmp}/none.png"], "none.png: cannot read this image"),
        (["--box", "1,1,2,2", "--mask_blur", "-1"], "--mask_blur -1: expected 0 or more pixels"),
        (["--box", "1,1,2,2", "--init-img", "{tmp}/no.jpg"], "no.jpg: cannot read this image"),
    ],
)
def test_what_is_refused_is_one_line_and_leaves_no_folder(command, tmp_path, caplog, arguments, words):  # fmt: skip
    command(*arguments, status=1)
    error = caplog.records[-1].getMessage()
    assert error.startswith("error: ") and words in error and "\n" not in error
    assert not (tmp_path / "out").exists()
