"""LDM's habits that scripts rely on: what samplers, web UIs and ControlNet-like scripts read and
call.
"""

import itertools

import numpy as np
import pytest
import torch

from ldm.errors import UserError
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.parameterization import PARAMETERIZATIONS
from ldm.models.diffusion.schedule import NoiseSchedule
from ldm.modules.diffusionmodules import util
from ldm.modules.encoders import tokenizer
from ldm.rng import SampleRandom
from ldm.util import count_params, default, exists, log_txt_as_img
from tests.support import golden
from tests.support.models import batch, build, step, unet_inputs

PROMPT = "photo of a sks dog"

# What each is on the golden model, in the order of the issue that asked for them.
ATTRIBUTES = {
    "parameterization": lambda model: "eps",
    "num_timesteps": lambda model: 1000,
    "channels": lambda model: 4,
    "image_size": lambda model: golden.CONFIG["image_size"],
    "scale_factor": lambda model: golden.CONFIG["scale_factor"],
    "first_stage_key": lambda model: "image",
    "cond_stage_key": lambda model: "caption",
    "cond_stage_trainable": lambda model: True,
    "use_ema": lambda model: False,
    "device": lambda model: torch.device("cpu"),
    "model.conditioning_key": lambda model: "crossattn",
    "model.diffusion_model.dtype": lambda model: torch.float32,
    "model.diffusion_model.model_channels": lambda model: 32,
    "cond_stage_model.max_length": lambda model: 77,
    "cond_stage_model.device": lambda model: torch.device("cpu"),
    "cond_stage_model.transformer.device": lambda model: torch.device("cpu"),
    "first_stage_model.embed_dim": lambda model: 4,
}


@pytest.mark.parametrize("path", ATTRIBUTES)
def test_attributes(golden_model, path):
    found = golden_model
    for name in path.split("."):
        found = getattr(found, name)
    assert found == ATTRIBUTES[path](golden_model)


@pytest.mark.parametrize("name", [*NoiseSchedule.names(), "lvlb_weights"])
def test_the_schedule_is_in_attributes(golden_model, name):
    assert getattr(golden_model, name).shape == (1000,)


# What the output stands for


@pytest.mark.parametrize("name", PARAMETERIZATIONS)
def test_the_parameterization_is_a_string(name):
    model = build(parameterization=name)
    assert model.parameterization == name and isinstance(model.parameterization, str)
    assert {name: "found"}[model.parameterization] == "found"
    assert [other for other in PARAMETERIZATIONS if model.parameterization == other] == [name]


def test_another_parameterization_can_be_set():
    """As web UIs do that find out from a file's output that it predicts v."""
    model, v = build(), build(parameterization="v")
    model.parameterization = "v"
    assert torch.equal(model.lvlb_weights, v.lvlb_weights)
    assert torch.equal(step(model, batch(1))[0], step(v, batch(1))[0])
    x, _, c = unet_inputs()
    sampled = [
        DDIMSampler(m).sample(3, 2, (4, 8, 8), c, x_T=x, verbose=False)[0]
        for m in (model, v, build())
    ]
    assert torch.equal(sampled[0], sampled[1]) and not torch.equal(sampled[0], sampled[2])
    with pytest.raises(UserError, match="parameterization: unknown 'flow'; accepted: eps, x0, v"):
        model.parameterization = "flow"


# Equations on the schedule


def test_equations(golden_model):
    x_start, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.manual_seed(0))
    t = torch.tensor([1, 400, 999])
    acp = golden_model.alphas_cumprod[t].reshape(3, 1, 1, 1)
    z = golden_model.q_sample(x_start, t, noise)
    v = golden_model.get_v(x_start, noise, t)
    torch.testing.assert_close(z, acp.sqrt() * x_start + (1 - acp).sqrt() * noise)
    torch.testing.assert_close(v, acp.sqrt() * noise - (1 - acp).sqrt() * x_start)
    for found, expected in (
        (golden_model.predict_start_from_z_and_v(z, t, v), x_start),
        (golden_model.predict_eps_from_z_and_v(z, t, v), noise),
        (golden_model.predict_start_from_noise(z, t, noise), x_start),
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)


def test_the_posterior_has_ldms_three_parts(golden_model):
    x_start, x_t = torch.randn(2, 2, 4, 8, 8, generator=torch.manual_seed(0))
    t = torch.tensor([5, 900])
    mean, variance, log_variance = golden_model.q_posterior(x_start, x_t, t)
    betas, acp = golden_model.betas[t].double(), golden_model.alphas_cumprod[t].double()
    acp_prev = golden_model.alphas_cumprod_prev[t].double()
    # DDPM, eq. 7
    of_start, of_x = (
        betas * acp_prev.sqrt() / (1 - acp),
        (1 - betas).sqrt() * (1 - acp_prev) / (1 - acp),
    )
    expected = of_start[:, None, None, None] * x_start + of_x[:, None, None, None] * x_t
    torch.testing.assert_close(mean, expected.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        variance.flatten().double(), betas * (1 - acp_prev) / (1 - acp), rtol=1e-4, atol=0
    )
    torch.testing.assert_close(log_variance, variance.log())


# Text


@torch.no_grad()
def test_unconditional_conditioning(golden_model):
    found = golden_model.get_unconditional_conditioning(3)
    torch.testing.assert_close(found, golden_model.get_learned_conditioning([""] * 3))
    named = golden_model.get_unconditional_conditioning(2, "a dog")
    torch.testing.assert_close(named, golden_model.get_learned_conditioning(["a dog"] * 2))


@torch.no_grad()
def test_one_caption_may_be_a_bare_string(golden_model):
    expected = golden_model.get_learned_conditioning([PROMPT])
    assert torch.equal(golden_model.get_learned_conditioning(PROMPT), expected)
    assert torch.equal(golden_model.cond_stage_model.encode(PROMPT), expected)
    assert torch.equal(golden_model.cond_stage_model(PROMPT), expected)


def test_the_text_encoders_device_may_be_set(golden_model):
    encoder = golden_model.cond_stage_model
    encoder.device = "cuda"
    assert encoder.device == torch.device("cpu")  # where its weights are
    assert encoder([PROMPT]).shape == (1, 77, 32)


TEXTS = [PROMPT, "", "A café, 2 DOGS & 1 cat's   <hat>!", "dog " * 100]


def test_the_tokenizer_is_transformers_with_our_ids(golden_model):
    encoder = golden_model.cond_stage_model
    options = {
        "truncation": True,
        "max_length": 77,
        "padding": "max_length",
        "return_tensors": "pt",
    }
    for text in TEXTS:
        assert torch.equal(
            encoder.tokenizer(text, **options)["input_ids"], encoder.tokenize([text])
        ), text
    words = encoder.tokenizer
    assert (words.bos_token_id, words.eos_token_id, words.model_max_length) == (
        tokenizer.START,
        tokenizer.END,
        77,
    )
    assert words.decode(tokenizer.encode(PROMPT)) == PROMPT
    assert words.get_vocab()["<|endoftext|>"] == tokenizer.END
    assert words([PROMPT], add_special_tokens=False)["input_ids"] == [tokenizer.encode(PROMPT)]


def test_words_that_a_script_adds_are_read():
    encoder = build().cond_stage_model
    assert encoder.tokenizer.add_tokens("<my-dog>") == 1
    number = len(encoder.tokenizer) - 1
    found = encoder.tokenize(["a <my-dog>", "a dog"])
    assert found[0, :4].tolist() == [tokenizer.START, *tokenizer.encode("a"), number, tokenizer.END]
    assert torch.equal(found[1:], tokenizer.tokenize(["a dog"]))


@torch.no_grad()
def test_the_text_transformer_can_be_called(golden_model):
    encoder = golden_model.cond_stage_model
    found = encoder.transformer(input_ids=encoder.tokenize([PROMPT]), output_hidden_states=True)
    assert torch.equal(found.last_hidden_state, encoder([PROMPT]))
    last = encoder.transformer.text_model.final_layer_norm(found.hidden_states[-1])
    torch.testing.assert_close(last, found.last_hidden_state)
    assert encoder.transformer.get_input_embeddings() is encoder.token_embedding
    assert encoder.transformer.config.hidden_size == 32


def test_a_text_encoder_can_be_frozen():
    encoder = build().cond_stage_model
    encoder.freeze()
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())


# Foreign samplers


class SigmaDenoiser:
    """A model as k-diffusion's wrapper for CompVis models sees it, in noise levels instead of time
    steps.
    """

    def __init__(self, model):
        self.model = model
        self.sigmas = ((1 - model.alphas_cumprod) / model.alphas_cumprod).sqrt()

    def __call__(self, x, sigma, **kwargs):
        # The time step of a noise level, which may lie between two.
        t = np.interp(float(sigma.log()), self.sigmas.log().numpy(), np.arange(len(self.sigmas)))
        steps = torch.full((len(x),), t, dtype=torch.float32)
        eps = self.model.apply_model(x / (sigma**2 + 1).sqrt(), steps, **kwargs)
        return x - sigma * eps


@torch.no_grad()
def test_a_wrapper_in_noise_levels_samples_what_ddim_does(golden_model):
    """Euler's steps over noise levels are DDIM's over time steps (Song et al., section 4.3)."""
    x_T, c = SampleRandom([1, 2]).randn((2, 4, 8, 8)), unet_inputs()[2]
    sampler = DDIMSampler(golden_model)
    expected, _ = sampler.sample(5, 2, (4, 8, 8), c, x_T=x_T, verbose=False)
    wrapped = SigmaDenoiser(golden_model)
    order = [*sampler.ddim_timesteps.flip(0).tolist(), 0]
    x = x_T * (wrapped.sigmas[order[0]] ** 2 + 1).sqrt()
    for now, then in itertools.pairwise(order):
        sigma = wrapped.sigmas[now]
        slope = (x - wrapped(x, sigma, cond=c)) / sigma
        x = x + slope * (wrapped.sigmas[then] - sigma)
    x = x * golden_model.alphas_cumprod[0].sqrt()
    assert golden.rel(x, expected) < 1e-4


def test_schedule_functions():
    betas = util.make_beta_schedule(
        schedule="linear", n_timestep=1000, linear_start=0.00085, linear_end=0.012
    )
    expected = NoiseSchedule.create(1000, "linear", 0.00085, 0.012)
    assert betas.dtype == np.float64
    torch.testing.assert_close(torch.from_numpy(betas).float(), expected.betas)
    picked = util.extract_into_tensor(expected.betas, torch.tensor([3, 7]), (2, 4, 8, 8))
    assert (
        picked.shape == (2, 1, 1, 1)
        and picked.flatten().tolist() == expected.betas[[3, 7]].tolist()
    )
    assert util.make_ddim_timesteps("uniform", 10, 1000).tolist() == list(range(1, 1000, 100))
    assert len(util.make_ddim_timesteps("uniform", 300, 1000, verbose=False)) == 300


def test_ddims_sampling_parameters():
    acp = NoiseSchedule.create(1000, "linear", 0.00085, 0.012).alphas_cumprod.double().numpy()
    visited = util.make_ddim_timesteps("uniform", 4, 1000)
    sigmas, alphas, before = util.make_ddim_sampling_parameters(acp, visited, eta=0.5)
    assert alphas.tolist() == acp[visited].tolist() and before.tolist() == [
        acp[0],
        *acp[visited][:-1],
    ]
    expected = 0.5 * np.sqrt((1 - before) / (1 - alphas)) * np.sqrt(1 - alphas / before)
    np.testing.assert_allclose(sigmas, expected, rtol=1e-12)
    noise = util.noise_like((3, 4, 8, 8), "cpu", repeat=True)
    assert noise.shape == (3, 4, 8, 8) and torch.equal(noise[0], noise[2])
    assert not torch.equal(*util.noise_like((2, 4, 8, 8), "cpu"))


def test_timestep_embedding_takes_ldms_arguments():
    t = torch.tensor([0, 3])
    plain = util.timestep_embedding(t, 8, repeat_only=False)
    assert plain.shape == (2, 8) and plain[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    assert util.timestep_embedding(t, 4, repeat_only=True).tolist() == [[0.0] * 4, [3.0] * 4]


# ldm.util


def test_small_functions():
    assert exists(0) and not exists(None)
    assert default(0, 5) == 0 and default(None, 5) == 5 and default(None, lambda: 6) == 6
    assert count_params(torch.nn.Linear(3, 2), verbose=True) == 8


def test_captions_as_pictures():
    pictures = log_txt_as_img((96, 64), ["a dog " * 10, ""], size=12)
    assert pictures.shape == (2, 3, 64, 96) and pictures.min() < 0 < pictures.max() == 1
    assert (pictures[1] == 1).all() and not torch.equal(pictures[0], pictures[1])
