"""The first stage: the reference's numbers, the posterior, its objective."""

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from ldm.errors import UserError
from ldm.models.autoencoder import AutoencoderKL
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.losses import LPIPSWithDiscriminator
from ldm.modules.losses.contperceptual import (
    LPIPS,
    VGG16_CONVS,
    adaptive_weight,
    hinge_loss,
    vanilla_loss,
)
from tests.support import golden
from tests.support.autoencoder import (
    LOSS,
    SMALLEST,
    TINY,
    images,
    recorded_shapes,
    shapes,
    trainable,
)
from tests.support.golden import FORWARD, rel, tensor

# The networks


@pytest.fixture(scope="module")
def first_stage():
    model = AutoencoderKL(**TINY)
    golden.load_golden_weights(model, "first_stage_model.")
    return model.eval().requires_grad_(False)


def test_encoder_computes_what_the_reference_does(first_stage):
    posterior = first_stage.encode(tensor("vae/image"))
    assert rel(posterior.parameters, tensor("vae/moments")) < FORWARD
    assert rel(posterior.std, tensor("vae/std")) < FORWARD
    assert rel(0.18215 * posterior.sample(tensor("vae/eps")), tensor("vae/scaled_latent")) < FORWARD


def test_decoder_computes_what_the_reference_does(first_stage):
    assert rel(first_stage.decode(tensor("vae/z")), tensor("vae/decode")) < FORWARD
    assert (
        rel(first_stage.decode(tensor("vae/z") / 0.18215), tensor("vae/decode_first_stage"))
        < FORWARD
    )


def test_forward_decodes_the_mode_or_a_sample(first_stage):
    x = tensor("vae/image")
    mode, posterior = first_stage(x, sample_posterior=False)
    torch.testing.assert_close(mode, first_stage.decode(posterior.mean))
    torch.manual_seed(3)
    sample, _ = first_stage(x)
    torch.manual_seed(3)
    torch.testing.assert_close(
        sample, first_stage.decode(posterior.mean + posterior.std * torch.randn(2, 4, 16, 16))
    )


@pytest.mark.parametrize("config, keys", [("v1", "sd_v1_keys.json"), ("tiny", "tiny_keys.json")])
def test_state_dict_keys_and_shapes(config, keys):
    ddconfig = TINY["ddconfig"]
    if config == "v1":
        ddconfig = {
            **ddconfig,
            "resolution": 256,
            "ch": 128,
            "ch_mult": [1, 2, 4, 4],
            "num_res_blocks": 2,
        }
    with torch.device("meta"):
        model = AutoencoderKL(ddconfig, {"target": "torch.nn.Identity"}, embed_dim=4)
    assert shapes(model) == recorded_shapes(keys)
    assert (model.embed_dim, model.downsampling) == (4, 2 ** (len(ddconfig["ch_mult"]) - 1))


def test_attention_at_the_named_resolutions():
    with torch.device("meta"):
        model = trainable(
            {**SMALLEST, "ch_mult": [1, 2, 2], "resolution": 64, "attn_resolutions": [32]}
        )
    attending = {key.split(".attn.")[0] for key in model.state_dict() if ".attn." in key}
    assert attending == {"encoder.down.1", "decoder.up.1"}  # 64, then 32, then 16 pixels


def test_without_convolutions_to_resample():
    model = trainable({**SMALLEST, "resamp_with_conv": False})
    assert not [key for key in model.state_dict() if "sample" in key]
    assert model(images())[0].shape == (2, 3, 32, 32)


@pytest.mark.parametrize("change", [{"ch": 48}, {"ch_mult": [1, 0]}, {"ch_mult": []}])
def test_widths_that_the_norm_groups_do_not_divide(change):
    with pytest.raises(UserError, match=r"ch .*ch_mult"):
        trainable({**SMALLEST, **change})


def test_config_errors_name_the_key():
    with pytest.raises(UserError, match=r"ddconfig\.chmult: unknown key .*did you mean 'ch_mult'"):
        trainable({**SMALLEST, "chmult": [1]})
    with pytest.raises(UserError, match="double_z"):
        trainable({**SMALLEST, "double_z": False})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_checkpointing_gives_the_same_gradients(precision):
    losses, gradients, x = [], [], images()
    for use_checkpoint in (False, True):
        model = trainable(use_checkpoint=use_checkpoint)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            reconstruction, posterior = model(x, sample_posterior=False)
            loss = nn.functional.mse_loss(reconstruction.float(), x) + posterior.kl().mean()
        recomputed = []
        hook = model.encoder.mid.block_1.conv1.register_forward_hook(
            lambda *_, seen=recomputed: seen.append(1)
        )
        loss.backward()
        hook.remove()
        assert len(recomputed) == use_checkpoint
        losses.append(loss.detach())
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert losses[0] == losses[1] and len(gradients[0]) > 100
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7, msg=name)


# The posterior


def gaussians():
    draw = torch.Generator().manual_seed(0)
    return [DiagonalGaussianDistribution(torch.randn(3, 8, 5, 7, generator=draw)) for _ in range(2)]


def test_kl_and_nll_are_those_of_torch():
    p, q = gaussians()
    ours, other = Normal(p.mean, p.std), Normal(q.mean, q.std)
    unit = Normal(torch.zeros_like(p.mean), torch.ones_like(p.mean))
    torch.testing.assert_close(p.kl(), kl_divergence(ours, unit).sum((1, 2, 3)))
    torch.testing.assert_close(p.kl(q), kl_divergence(ours, other).sum((1, 2, 3)))
    torch.testing.assert_close(p.nll(q.mean), -ours.log_prob(q.mean).sum((1, 2, 3)))
    torch.testing.assert_close(p.nll(q.mean, dims=[1]), -ours.log_prob(q.mean).sum(1))


def test_samples_follow_the_noise_that_is_given_and_else_the_global_generator():
    p, _ = gaussians()
    noise = torch.full_like(p.mean, 2.0)
    torch.testing.assert_close(p.sample(noise), p.mean + 2 * p.std)
    torch.manual_seed(5)
    drawn = p.sample()
    torch.manual_seed(5)
    torch.testing.assert_close(drawn, p.mean + p.std * torch.randn(p.mean.shape))


def test_extreme_variances_are_clamped():
    p = DiagonalGaussianDistribution(torch.tensor([0.0, 0.0, -100.0, 100.0]).view(1, 4, 1, 1))
    assert p.logvar.flatten().tolist() == [-30.0, 20.0]
    assert p.kl().isfinite().all()


def test_deterministic_posterior():
    p = DiagonalGaussianDistribution(gaussians()[0].parameters, deterministic=True)
    assert torch.equal(p.sample(), p.mode()) and not p.kl().any() and not p.var.any()


def test_half_precision_sums_are_wide():
    parameters = torch.zeros(1, 8, 64, 64, dtype=torch.bfloat16)
    parameters[:, :4] = 1.0
    p = DiagonalGaussianDistribution(parameters)
    assert p.kl().item() == 0.5 * 4 * 64 * 64  # in bfloat16 a running sum of ones ends at 256
    assert p.sample().dtype == torch.bfloat16


# The objective


def test_adversarial_losses():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.0])
    assert hinge_loss(real, fake).item() == pytest.approx(0.5 * (0.25 + 0.5))
    cross_entropy = nn.functional.binary_cross_entropy_with_logits
    expected = 0.5 * (cross_entropy(real, torch.ones(2)) + cross_entropy(fake, torch.zeros(2)))
    torch.testing.assert_close(vanilla_loss(real, fake), expected)


def test_adaptive_weight_is_the_ratio_of_gradients():
    layer = torch.ones(4, requires_grad=True)
    assert adaptive_weight(6 * layer.sum(), 2 * layer.sum(), layer).item() == pytest.approx(
        3, rel=1e-3
    )
    assert adaptive_weight(6 * layer.sum(), 0 * layer.sum(), layer).item() == pytest.approx(1e4)


def test_generator_loss_is_the_sum_of_its_weighted_terms():
    x, (posterior, _) = images(3), gaussians()
    layer = torch.tensor(0.9, requires_grad=True)
    y = layer * x
    options = {
        "kl_weight": 0.1,
        "pixelloss_weight": 2.0,
        "logvar_init": 0.3,
        "disc_weight": 0.5,
        "disc_factor": 0.7,
    }
    loss = LPIPSWithDiscriminator(**{**LOSS, **options, "disc_start": 5, "pixel_loss": "l2"})
    before, logged = loss.generator_loss(x, y, posterior, 4, layer)
    nll = (2 * (x - y) ** 2 / torch.tensor(0.3).exp() + 0.3).flatten(1).sum(1).mean()
    torch.testing.assert_close(before, nll + 0.1 * posterior.kl().mean())
    torch.testing.assert_close(logged["train/rec_loss"], 2 * (x - y.detach()).square().mean())
    assert "train/g_loss" not in logged

    after, logged = loss.generator_loss(x, y, posterior, 5, layer)
    torch.testing.assert_close(
        after - before, 0.7 * logged["train/d_weight"] * logged["train/g_loss"]
    )
    g_loss = -loss.discriminator(y).mean()
    torch.testing.assert_close(
        logged["train/d_weight"], 0.5 * adaptive_weight(nll, g_loss, layer), rtol=1e-3, atol=0
    )


def test_discriminator_loss_gives_the_autoencoder_no_gradient():
    y = images(2).requires_grad_()
    loss, _ = LPIPSWithDiscriminator(**LOSS).discriminator_loss(images(2, seed=1), y)
    loss.backward()
    assert y.grad is None


@pytest.mark.parametrize(
    "params, words",
    [
        ({"disc_loss": "hing"}, "disc_loss: unknown 'hing' .*'hinge'.*vanilla"),
        ({"pixel_loss": "huber"}, "pixel_loss: unknown 'huber'.*l1, l2"),
        ({"disc_conditional": True}, "disc_conditional"),
    ],
)
def test_loss_config_errors(params, words):
    with pytest.raises(UserError, match=words):
        LPIPSWithDiscriminator(**{**LOSS, **params})


def test_missing_perceptual_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(
        torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("downloads")
    )
    with pytest.raises(
        UserError, match=rf"{tmp_path}.*vgg16-397923af\.pth.*lpips_path.*perceptual_weight: 0"
    ):
        LPIPSWithDiscriminator(**{**LOSS, "perceptual_weight": 1.0})
    torch.save({"lin0.model.1.weight": torch.zeros(1)}, tmp_path / "vgg.pth")
    with pytest.raises(UserError, match=r"vgg\.pth: no VGG16 weights"):
        LPIPSWithDiscriminator(
            **{**LOSS, "perceptual_weight": 1.0, "lpips_path": str(tmp_path / "vgg.pth")}
        )


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    """VGG16's features with random weights, as torchvision saves the trained ones."""
    from torchvision.models.vgg import cfgs, make_layers

    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.manual_seed(0)
    torch.save(
        {f"features.{key}": value for key, value in make_layers(cfgs["D"]).state_dict().items()},
        path,
    )
    return path


def test_perceptual_distance_is_that_of_taming(vgg_file, monkeypatch):
    from taming.modules.losses import lpips as taming
    from torchvision.models.vgg import VGG, cfgs, make_layers

    ours = LPIPS(str(vgg_file))

    def vgg16(pretrained):
        with torch.device("meta"):
            model = VGG(make_layers(cfgs["D"]), init_weights=False)
        model.features = make_layers(cfgs["D"])
        model.load_state_dict(torch.load(vgg_file), strict=False)
        return model

    monkeypatch.setattr(taming.models, "vgg16", vgg16)
    monkeypatch.setattr(taming.LPIPS, "load_from_pretrained", lambda self: None)
    theirs = taming.LPIPS().eval()
    for level in range(len(VGG16_CONVS)):
        getattr(theirs, f"lin{level}").model[1].weight.data = ours.get_buffer(f"linear{level}")
    x, y = images(2), images(2, seed=1)
    expected = theirs(x, y)
    assert expected.shape == (2, 1, 1, 1) and expected.min() > 0
    torch.testing.assert_close(ours(x, y), expected, rtol=1e-4, atol=0)
    assert not ours(x, x).any()


def test_perceptual_weights_are_used_and_neither_trained_nor_saved(vgg_file):
    loss = LPIPSWithDiscriminator(**{**LOSS, "perceptual_weight": 3.0, "lpips_path": str(vgg_file)})
    assert not [key for key in loss.state_dict() if "perceptual" in key]
    assert not list(loss.perceptual_loss.parameters())
    x, y = images(2), torch.zeros(2, 3, 32, 32, requires_grad=True)
    nll, _, logged = loss.reconstruction_loss(x, y, gaussians()[0], "train")
    expected = x.abs().mean() + 3 * loss.perceptual_loss(x, y).mean()
    torch.testing.assert_close(logged["train/rec_loss"], expected.detach())
    nll.backward()
    assert y.grad.isfinite().all()  # flat pictures have pixels without any feature
