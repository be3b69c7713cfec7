"""Whitened latents: the first stage that gives them, and the command that makes it."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ldm.checkpoints.parts import load_part
from ldm.data.latents import CachedLatents
from ldm.models.autoencoder import AutoencoderKL
from scripts.tiny import whiten_latents
from tests.support import golden, runs
from tests.support.small_world import draw_sprites, trained, world

DDCONFIG = {
    "z_channels": 4,
    "resolution": 16,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 1],
    "num_res_blocks": 1,
    "double_z": True,
    "attn_resolutions": [],
}
LOSS = {
    "target": "ldm.modules.losses.LPIPSWithDiscriminator",
    "params": {"disc_start": 1, "perceptual_weight": 0.0, "disc_ch": 8, "disc_num_layers": 1},
}


@pytest.fixture(scope="module")
def sprites(tmp_path_factory):
    return draw_sprites(tmp_path_factory.mktemp("sprites"))


def test_whitening_keeps_reconstructions():
    first_stage = golden.latent_diffusion().first_stage_model.eval()
    twin = golden.latent_diffusion().first_stage_model.eval()
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)

    def statistics(model):
        latents = model.encode(x).mean.transpose(0, 1).flatten(1)
        return latents.mean(1), latents.cov()

    with torch.no_grad():
        twin.whiten(*statistics(first_stage))
        mean, covariance = statistics(twin)
        torch.testing.assert_close(mean, torch.zeros(4), atol=1e-4, rtol=0)
        torch.testing.assert_close(covariance, torch.eye(4), atol=1e-3, rtol=0)
        first, second = (model(x, sample_posterior=False)[0] for model in (first_stage, twin))
        torch.testing.assert_close(first, second, atol=1e-3, rtol=1e-3)


def test_whitening_with_independent_channels_scales_their_deviations():
    first_stage = golden.latent_diffusion().first_stage_model.eval()
    twin = golden.latent_diffusion().first_stage_model.eval()
    x = torch.zeros(1, 3, 16, 16)
    twin.whiten(torch.zeros(4), torch.diag(torch.tensor([1.0, 4.0, 9.0, 16.0])))
    ratio = first_stage.encode(x).std / twin.encode(x).std
    torch.testing.assert_close(ratio.mean((0, 2, 3)), torch.tensor([1.0, 2.0, 3.0, 4.0]))


def test_the_command_whitens_a_trained_autoencoder(sprites, tmp_path):
    decay = {"target": "ldm.optim.schedules.WarmupLinearDecay", "params": {"steps": 3}}
    params = {
        "embed_dim": 4,
        "optimizer": "muon",
        "scheduler_config": decay,
        "ddconfig": DDCONFIG,
        "lossconfig": LOSS,
    }
    run = trained(tmp_path, "ldm.models.autoencoder.AutoencoderKL", params, world(sprites), 2, 3)
    rates = [float(row["lr-Muon/pg1"]) for row in runs.csv_rows(run) if row.get("lr-Muon/pg1")]
    assert rates == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3])

    output = tmp_path / "first_stage.safetensors"
    checkpoint = run / "checkpoints" / "last.ckpt"
    assert (
        whiten_latents.main(["--ckpt", str(checkpoint), "--output", str(output), "--images", "8"])
        == 0
    )
    identity = {"target": "torch.nn.Identity"}
    model = AutoencoderKL(DDCONFIG, identity, embed_dim=4).eval()
    load_part(model, output)
    mean, covariance = whiten_latents.statistics(
        model, CachedLatents("unused", world(sprites)).source, 6
    )
    np.testing.assert_allclose(mean, 0, atol=1e-3)
    np.testing.assert_allclose(covariance, np.eye(4), atol=1e-2)


def test_a_frozen_encoder_keeps_its_latents():
    model = AutoencoderKL(DDCONFIG, LOSS, embed_dim=4, freeze_encoder=True, optimizer="muon")
    trained = {
        id(p) for group in model.configure_optimizers()[0].param_groups for p in group["params"]
    }
    decoder = {id(p) for part in (model.decoder, model.post_quant_conv) for p in part.parameters()}
    assert trained == decoder


def test_whitening_something_else(tmp_path, capsys, caplog):
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    command = [
        "--ckpt",
        str(tmp_path / "other.safetensors"),
        "--output",
        str(tmp_path / "out.safetensors"),
    ]
    assert whiten_latents.main(command) == 1
    assert "does not say what it was trained on" in caplog.text
    assert not (tmp_path / "out.safetensors").exists()
