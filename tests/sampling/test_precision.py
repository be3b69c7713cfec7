"""Pictures in half precision: close to those of float32."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ldm.errors import UserError
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.sampling.metadata import read_recipe
from ldm.sampling.precision import dtype_of_weights, halve
from ldm.sampling.text_to_image import Recipe, load_model, text_to_image
from ldm.tiny.miniature import WEIGHTS
from scripts import txt2img
from tests.support.photos import as_numbers

PROMPTS = ["photo of a dog", "photo of a red ball on the beach"]
RECIPE = Recipe(3, 5.0, height=64, width=64)


@pytest.fixture(scope="module")
def full():
    return load_model(WEIGHTS)


@pytest.fixture(scope="module")
def in_full(full):
    return text_to_image(full, PROMPTS, [0, 1], RECIPE)


@pytest.fixture(scope="module")
def halved():
    return halve(load_model(WEIGHTS))


def distance(pictures, others):
    """Return the mean difference of pixels in [0, 255]."""
    return np.abs(as_numbers(pictures) - as_numbers(others)).mean()


def test_half_precision_is_close_to_full(full, in_full, halved):
    networks = (halved.model, halved.cond_stage_model, halved.first_stage_model)
    of_networks = {p.dtype for network in networks for p in network.parameters()}
    assert of_networks == {torch.bfloat16} and halved.schedule.betas.dtype == torch.float32
    # Eight bits of each number are left, 1 in 256: 1.1 was measured, and 60 for other noise.
    found = text_to_image(halved, PROMPTS, [0, 1], RECIPE, precision="half")
    assert 0 < distance(found, in_full) < 5
    assert distance(text_to_image(full, PROMPTS, [2, 3], RECIPE), in_full) > 25


def test_one_call_in_half_precision(full, halved):
    torch.manual_seed(0)
    x, t = torch.randn(2, full.latent_channels, 16, 16), torch.tensor([900, 20])
    with torch.no_grad():
        expected, found = (
            model.apply_model(x, t, model.get_learned_conditioning(PROMPTS))
            for model in (full, halved)
        )
    assert found.dtype == torch.float32, "the sampler computes in it"
    error = (found - expected).abs().amax() / expected.abs().amax()
    assert 0 < error < 0.03  # 0.004 to 0.006 was measured


@pytest.mark.parametrize(
    "given, recorded",
    [
        ("--precision half", {"precision": "half"}),
        ("--compile --vae_slicing", {"compile": True, "vae_slicing": True}),
    ],
)
def test_the_command_draws_in_other_kernels_and_again(tmp_path, monkeypatch, given, recorded):
    compiled = []
    monkeypatch.setattr(UNetModel, "compile_for_sampling", lambda unet: compiled.append(unet))
    flags = ["--ckpt", str(WEIGHTS), "--ddim_steps", "2", *given.split()]
    flags += ["--n_samples", "1", "--n_iter", "1", "--outdir", str(tmp_path / "one")]
    assert txt2img.main([*flags, "--prompt", "a dog"]) == 0
    (first,) = (tmp_path / "one/samples").iterdir()
    assert recorded.items() <= read_recipe(first).items()
    assert txt2img.main(["--like", str(first), "--outdir", str(tmp_path / "two")]) == 0
    (second,) = (tmp_path / "two/samples").iterdir()
    assert first.read_bytes() == second.read_bytes()
    assert len(compiled) == (2 if "compile" in recorded else 0)


def test_a_guide_is_in_half_precision_as_the_model_that_it_guides(in_full, halved):
    guided = replace(RECIPE, guide_ckpt=str(WEIGHTS))
    # A model that guides itself is classifier-free guidance, but for the batch of its calls.
    found = text_to_image(halved, PROMPTS, [0, 1], guided, precision="half")
    assert 0 < distance(found, in_full) < 5


def test_a_unet_that_cannot_be_compiled_is_one_line():
    model = load_model(WEIGHTS)

    def without_compiler(graph, inputs):
        raise OSError("no compiler here\nand more")

    model.model.diffusion_model.compile_for_sampling({"backend": without_compiler})
    with pytest.raises(UserError, match=r"--compile: .*raised.*: give --no-compile"):
        text_to_image(model, PROMPTS[:1], [0], RECIPE)


def test_what_is_not_half_is_not_called_so(full):
    for precision, words in (("half", "call halve"), ("bf16", "accepted: full, autocast, half")):
        with pytest.raises(UserError, match=words):
            text_to_image(full, PROMPTS[:1], [0], RECIPE, precision=precision)


@pytest.mark.parametrize(
    "device, precision, dtype",
    [
        ("cpu", "full", None),
        ("cpu", "autocast", None),
        ("cpu", "half", torch.bfloat16),
        ("cuda", "full", None),
        ("cuda", "autocast", torch.float16),
        ("cuda", "half", torch.float16),
    ],
)
def test_the_precision_of_the_weights(device, precision, dtype):
    assert dtype_of_weights(torch.device(device), precision) == dtype
