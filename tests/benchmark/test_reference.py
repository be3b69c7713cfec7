"""The references that the benchmark measures ours against compute our loss."""

import pytest
import torch
from einops import rearrange

from ldm.benchmark.reference import DiffusersDreamBooth, TwoForward
from ldm.benchmark.variants import checked_config
from ldm.checkpoints.diffusers_format import to_diffusers
from ldm.rng import SampleRandom
from ldm.util import instantiate_from_config
from tests.support import golden, runs


def shared_step_loss(model, images, captions, count, seeds=None):
    """Ours, of images whose first `count` are the subject's."""
    images = rearrange(images, "b c h w -> b h w c")
    halves = [
        {
            "image": images[part],
            "caption": captions[part],
            **({} if seeds is None else {"noise_seed": seeds[part]}),
        }
        for part in (slice(None, count), slice(count, None))
    ]
    return model.shared_step(halves, "train")[0]


def test_the_diffusers_step_has_our_loss(tmp_path):
    pytest.importorskip("diffusers")
    base = runs.config(tmp_path, data__params__batch_size=2, model__params__reg_weight=0.5)
    config = checked_config([base], ["data.params.train.params.size=16"])
    ours = instantiate_from_config(config["model"])
    golden.load_golden_weights(ours)
    theirs = DiffusersDreamBooth(config, torch.device("cpu"))
    for name, state in to_diffusers(ours.state_dict()).items():
        network = {"unet": theirs.unet, "vae": theirs.vae, "text_encoder": theirs.text_encoder}[
            name
        ]
        known = network.state_dict()
        network.load_state_dict(
            {key if key in known else key.removeprefix("text_model."): state[key] for key in state}
        )

    captions = ["photo of a sks dog"] * 2 + ["photo of a dog"] * 2
    assert torch.equal(theirs.tokens, ours.cond_stage_model.tokenize(captions))
    seeds = torch.arange(4)
    random = SampleRandom(seeds)
    eps, t, noise = random.randn((4, 4, 8, 8)), random.randint(1000, 4), random.randn((4, 4, 8, 8))
    posterior = theirs.vae.encode(theirs.images).latent_dist
    latents = (posterior.mean + posterior.std * eps) * theirs.vae.config.scaling_factor
    expected = shared_step_loss(ours, theirs.images, captions, 2, seeds)
    found = theirs.loss(latents, theirs.tokens, noise, t)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_diffusers_step_trains_unet_and_text_encoder(tmp_path):
    pytest.importorskip("diffusers")
    config = checked_config([runs.golden_config(tmp_path)], ["data.params.train.params.size=16"])
    theirs = DiffusersDreamBooth(config, torch.device("cpu"))
    networks = {"unet": theirs.unet, "vae": theirs.vae, "text_encoder": theirs.text_encoder}
    before = {
        name: [p.detach().clone() for p in network.parameters()]
        for name, network in networks.items()
    }
    theirs.step()
    changed = {
        name
        for name, n in networks.items()
        if any(not torch.equal(a, b) for a, b in zip(before[name], n.parameters()))
    }
    assert changed == {"unet", "text_encoder"}
    assert theirs.unet.is_gradient_checkpointing and all(p.grad is None for p in theirs.trained)


def test_two_passes_have_our_loss(tmp_path):
    base = runs.config(tmp_path, data__params__batch_size=2, model__params__reg_weight=0.5)
    plain = TwoForward(
        checked_config([base], ["data.params.train.params.size=16"]), torch.device("cpu")
    )
    golden.load_golden_weights(plain.model)
    (images, captions), (prior_images, prior_captions) = plain.parts
    torch.manual_seed(5)
    found = plain.loss()
    torch.manual_seed(5)
    together = torch.cat([images, prior_images])
    expected = shared_step_loss(plain.model, together, captions + prior_captions, 2)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
