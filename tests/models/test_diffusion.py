"""`LatentDiffusion`'s methods that others call: pictures, latents, schedule, conditioning."""

import pytest
import torch

from ldm.errors import UserError
from ldm.models.diffusion.conditioning import DiffusionWrapper, tensors
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.schedule import NoiseSchedule
from tests.support import golden
from tests.support.golden import rel
from tests.support.models import SIZE, UNET, averaged, batch, build, unet_inputs


@pytest.fixture
def averaged_model():
    """A model whose UNet is 1 away from its EMA weights."""
    return averaged(build(use_ema=True))


@pytest.fixture
def pictures_of(golden_model):
    """`log_images` with few steps."""

    def call(halves, **kwargs):
        return golden_model.log_images(halves, ddim_steps=2, **kwargs)

    return call


@pytest.mark.parametrize("n, count", [(1, 2), (4, 5)])
def test_log_images(pictures_of, n, count):
    halves = batch(1, 2), batch(11, 12, 13, caption="photo of a dog")
    pictures = pictures_of(halves, N=n)
    assert {name: image.shape for name, image in pictures.items()} == dict.fromkeys(
        ("inputs", "reconstruction", "samples"), (count, 3, SIZE, SIZE)
    )
    assert torch.equal(pictures["inputs"][0], halves[0]["image"][0].permute(2, 0, 1))
    assert torch.equal(pictures["inputs"][-1], halves[1]["image"][min(n, 3) - 1].permute(2, 0, 1))
    assert all(image.isfinite().all() for image in pictures.values())


def test_log_images_is_reproducible_and_leaves_the_generator_alone(pictures_of):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, again, other = (pictures_of(batch(1), seed=seed)["samples"] for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_log_images_without_samples_of_one_batch(pictures_of):
    assert set(pictures_of(batch(1), sample=False)) == {"inputs", "reconstruction"}


def test_log_images_shows_the_averaged_weights(averaged_model):
    inside = averaged_model.log_images(batch(1), ddim_steps=2)["samples"]
    averaged_model.model_ema.copy_to(averaged_model.model)
    averaged_model.model_ema = None
    # The copy to the model and back rounds: its weights are 1 away from the average.
    assert torch.equal(inside, averaged_model.log_images(batch(1), ddim_steps=2)["samples"])


@torch.no_grad()
def test_latents_are_scaled_samples_of_the_posterior(golden_model):
    posterior = golden_model.encode_first_stage(torch.rand(2, 3, 16, 16) * 2 - 1)
    scale = golden.CONFIG["scale_factor"]
    z = torch.randn(2, 4, 8, 8)
    assert torch.equal(golden_model.get_first_stage_encoding(z), scale * z)
    given = golden_model.get_first_stage_encoding(posterior, z)
    torch.testing.assert_close(given, scale * (posterior.mean + posterior.std * z))
    first, second = (golden_model.get_first_stage_encoding(posterior) for _ in range(2))
    assert not torch.equal(first, second)
    torch.testing.assert_close(
        golden_model.decode_first_stage(z), golden_model.first_stage_model.decode(z / scale)
    )
    assert (golden_model.latent_channels, golden_model.downsampling) == (4, 2)


def test_the_schedule_is_that_of_the_buffers(fresh_golden_model):
    assert fresh_golden_model.schedule.betas is fresh_golden_model.betas
    other = NoiseSchedule.create(1000, "cosine")
    fresh_golden_model.load_state_dict(
        fresh_golden_model.state_dict()
        | {name: getattr(other, name) for name in NoiseSchedule.names()}
    )
    sampler = DDIMSampler(fresh_golden_model)
    sampler.make_schedule(10)
    assert torch.equal(sampler.ddim_alphas, other.alphas_cumprod[sampler.ddim_timesteps])


# Conditioning


@torch.no_grad()
def test_crossattn_takes_tensors_lists_and_mappings(golden_model):
    x, t, c = unet_inputs()
    expected = golden_model.apply_model(x, t, c)
    for cond in ([c], {"c_crossattn": [c]}, {"c_crossattn": (c[:, :40], c[:, 40:])}):
        torch.testing.assert_close(
            golden_model.apply_model(x, t, cond), expected, rtol=0, atol=1e-6
        )
    assert rel(golden_model.apply_model(x, t, 2 * c), expected) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("extra", [None, [None], [], "image", "tensor"])
def test_a_crossattn_model_ignores_what_it_does_not_read(golden_model, extra):
    """As LDM's: web UIs give every model the channels that only inpainting models read."""
    x, t, c = unet_inputs()
    extra = {"image": [torch.zeros(2, 5, 1, 1)], "tensor": torch.ones(2, 5, 8, 8)}.get(
        str(extra), extra
    )
    cond = {"c_concat": extra, "c_crossattn": [c]}
    expected = golden_model.apply_model(x, t, c)
    assert torch.equal(golden_model.apply_model(x, t, cond), expected)
    assert torch.equal(golden_model.apply_model(x, t, {"c_crossattn": c}), expected)
    guided = {"unconditional_guidance_scale": 2.0, "x_T": x, "verbose": False}
    plain, same = (
        DDIMSampler(golden_model).sample(
            2, 2, (4, 8, 8), one, unconditional_conditioning=one, **guided
        )[0]
        for one in (c, cond)
    )
    assert torch.equal(plain, same)


def test_what_a_model_reads_is_demanded(golden_model, inpainting_model):
    x, t, c = unet_inputs()
    for nothing in (None, [None], {"c_crossattn": None}, {"c_concat": [torch.zeros(2, 5, 8, 8)]}):
        with pytest.raises(ValueError, match="reads a text embedding of width 32, and got none"):
            golden_model.apply_model(x, t, nothing)
    with pytest.raises(ValueError, match="a model of key hybrid needs c_concat"):
        inpainting_model.apply_model(x, t, {"c_concat": None, "c_crossattn": [c]})
    with pytest.raises(ValueError, match="expected tensors, got 'a dog'"):
        tensors({"c_crossattn": "a dog"})


@torch.no_grad()
def test_a_model_without_text_needs_no_condition():
    model = build({"context_dim": None})
    x, t, _ = unet_inputs()
    expected = model.model.diffusion_model(x, t)
    assert torch.equal(model.apply_model(x, t, None), expected)
    sampled, _ = DDIMSampler(model).sample(2, 2, (4, 8, 8), None, x_T=x, verbose=False)
    assert sampled.isfinite().all()


@pytest.fixture(scope="module")
def inpainting_model():
    """Nine input channels: noisy latent, mask and masked latent."""
    return build({"in_channels": 9}, conditioning_key="hybrid")


@torch.no_grad()
def test_hybrid_joins_channels_and_text(inpainting_model):
    x, t, c = unet_inputs()
    extra = torch.randn(2, 5, 8, 8)
    out = inpainting_model.apply_model(
        x, t, {"c_concat": [extra[:, :1], extra[:, 1:]], "c_crossattn": [c]}
    )
    expected = inpainting_model.model.diffusion_model(torch.cat([x, extra], dim=1), t, context=c)
    assert out.shape == x.shape
    assert torch.equal(out, expected)


def test_hybrid_samples_with_guidance(inpainting_model):
    x, _, c = unet_inputs()
    extra = torch.randn(2, 5, 8, 8)
    conds = [{"c_concat": [extra], "c_crossattn": [text]} for text in (c, torch.zeros_like(c))]
    out, _ = DDIMSampler(inpainting_model).sample(
        2, 2, (4, 8, 8), conds[0], x_T=x, verbose=False,
        unconditional_guidance_scale=3.0, unconditional_conditioning=conds[1],
    )  # fmt: skip
    assert out.shape == x.shape and out.isfinite().all()


@torch.no_grad()
def test_concat_reads_a_bare_tensor_as_channels():
    wrapper = DiffusionWrapper(
        {
            "target": golden.CONFIG["unet_config"]["target"],
            "params": {**UNET, "in_channels": 8, "context_dim": None},
        },
        "concat",
    )
    golden.load_golden_weights(wrapper)
    model = build({"context_dim": None, "in_channels": 8}, conditioning_key="concat")
    model.model = wrapper
    x, t, _ = unet_inputs()
    extra = torch.randn(2, 4, 8, 8)
    expected = wrapper.diffusion_model(torch.cat([x, extra], dim=1), t)
    assert torch.equal(model.apply_model(x, t, extra), expected)


def test_unknown_conditioning_key():
    with pytest.raises(
        UserError, match="conditioning_key: unknown 'adm'; accepted: crossattn, concat, hybrid"
    ):
        DiffusionWrapper(golden.CONFIG["unet_config"], "adm")
