"""How the first stage trains, resumes, starts from weights, and what it logs."""

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from ldm.checkpoints.parts import load_parts
from ldm.config import check_config, load_config, to_plain
from ldm.errors import UserError
from ldm.models.autoencoder import AutoencoderKL, image_metrics
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
from tests.support.golden import tensor
from tests.support.runs import ROOT


@pytest.fixture(scope="module")
def first_stage():
    model = AutoencoderKL(**TINY)
    golden.load_golden_weights(model, "first_stage_model.")
    return model.eval().requires_grad_(False)


class Watch(pl.Callback):
    """Records, after every batch, Lightning's count of steps, the weights' changes and the logged
    losses.
    """

    def __init__(self):
        self.steps, self.disc_moved, self.generator_moved, self.logged = [], [], [], []

    def on_train_batch_start(self, trainer, model, batch, batch_idx):
        self.before = {key: value.clone() for key, value in model.state_dict().items()}

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        moved = {
            key
            for key, value in model.state_dict().items()
            if not torch.equal(value, self.before[key])
        }
        self.steps.append(trainer.global_step)
        self.disc_moved.append(any(key.startswith("loss.") for key in moved))
        self.generator_moved.append(any(key.startswith("encoder.") for key in moved))
        self.logged.append({key: value.item() for key, value in trainer.callback_metrics.items()})


def examples(count=8):
    pictures = images(count).permute(0, 2, 3, 1)
    return [{"image": picture, "noise_seed": seed} for seed, picture in enumerate(pictures)]


def fit(model, folder, max_steps, ckpt_path=None, **options):
    """Train on 8 pictures, 4 a step, as Lightning does it; validate at the end."""
    watch = Watch()
    trainer = pl.Trainer(
        accelerator="cpu", default_root_dir=folder, max_steps=max_steps, logger=False, callbacks=[watch],
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, log_every_n_steps=1,
        num_sanity_val_steps=0, check_val_every_n_epoch=max(1, max_steps // 2), **options,
    )  # fmt: skip
    loaders = [DataLoader(examples(), batch_size=4) for _ in range(2)]
    trainer.fit(model, *loaders, ckpt_path=ckpt_path, weights_only=False if ckpt_path else None)
    return trainer, watch


def test_training(tmp_path):
    model = trainable(disc_start=6, disc_weight=0.1)
    before = model(images(8), sample_posterior=False)[0].sub(images(8)).abs().mean()
    trainer, watch = fit(model, tmp_path, max_steps=12)
    # A batch is a step, although two optimizers step; the discriminator's from disc_start on.
    assert watch.steps == list(range(1, 13)) and trainer.global_step == 12
    assert watch.disc_moved == [False] * 6 + [True] * 6
    assert all(watch.generator_moved)
    after = model(images(8), sample_posterior=False)[0].sub(images(8)).abs().mean()
    assert after < 0.75 * before
    assert {"train/rec_loss", "train/kl_loss", "train/disc_loss", "train/d_weight"} <= set(
        watch.logged[-1]
    )
    assert trainer.callback_metrics["val/rec_loss"].item() == pytest.approx(after.item(), rel=1e-4)
    assert {"val/psnr", "val/ssim"} <= set(trainer.callback_metrics)
    assert model.loss.discriminator.main[0].weight.requires_grad


def test_a_resumed_run_repeats_the_uninterrupted_one(tmp_path):
    whole, half, resumed = (trainable(disc_start=2) for _ in range(3))
    fit(whole, tmp_path, max_steps=6)
    fit(half, tmp_path, max_steps=4)[0].save_checkpoint(tmp_path / "half.ckpt")
    torch.manual_seed(99)
    _, watch = fit(resumed, tmp_path, max_steps=6, ckpt_path=tmp_path / "half.ckpt")
    assert watch.steps == [5, 6]
    for (key, expected), actual in zip(whole.state_dict().items(), resumed.state_dict().values()):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, msg=key)


def test_training_in_bfloat16(tmp_path):
    model = trainable(use_checkpoint=True)
    _, watch = fit(model, tmp_path, max_steps=2, precision="bf16-mixed")
    assert all(watch.disc_moved) and all(value == value for value in watch.logged[-1].values())


def test_a_frozen_first_stage_cannot_be_trained(tmp_path):
    with pytest.raises(UserError, match=r"torch\.nn\.Identity.*LPIPSWithDiscriminator"):
        fit(AutoencoderKL(**TINY), tmp_path, max_steps=1)


def test_batches_that_do_not_fit():
    model = trainable()
    with pytest.raises(
        UserError, match="image_key: no 'image' in the batch, which has jpg, caption"
    ):
        model.get_input({"jpg": 0, "caption": 0})
    with pytest.raises(UserError, match=r"33x32 pixels.*multiples of 2"):
        model.get_input({"image": torch.zeros(1, 32, 33, 3)})


def test_image_metrics():
    x = images(2) * 0.5
    metrics = image_metrics(x + 0.02, x, "val")
    assert metrics["val/psnr"].item() == pytest.approx(
        40, abs=0.01
    )  # an error of 0.01 on a scale of 1
    assert 0.9 < metrics["val/ssim"] < 1
    assert image_metrics(x, x, "val")["val/ssim"].item() == pytest.approx(1, abs=1e-5)
    both = image_metrics(torch.cat([x[:1] + 0.02, x[1:] + 0.2]), x, "val")["val/psnr"]
    assert both.item() == pytest.approx(
        (40 + 20) / 2, abs=0.02
    )  # the mean of images, not of their errors


def test_pictures(first_stage):
    batch = {"image": tensor("vae/image").permute(0, 2, 3, 1)}
    state = torch.get_rng_state()
    pictures = first_stage.log_images(batch, N=1, split="val")
    assert set(pictures) == {"inputs", "reconstructions", "samples"}
    torch.testing.assert_close(pictures["inputs"], tensor("vae/image")[:1])
    for images_ in pictures.values():
        assert images_.shape == (1, 3, 32, 32) and images_.abs().max() <= 1
    assert torch.equal(torch.get_rng_state(), state)


def test_initial_weights_from_a_checkpoint(tmp_path):
    source = trainable(seed=1)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "whole.ckpt")
    weights = {
        key: value for key, value in source.state_dict().items() if not key.startswith("loss.")
    }
    torch.save({"state_dict": weights}, tmp_path / "frozen.ckpt")
    lossconfig = {"target": "ldm.modules.losses.LPIPSWithDiscriminator", "params": LOSS}
    params = {"ddconfig": SMALLEST, "lossconfig": lossconfig, "embed_dim": 4}
    for name, ignore in (("whole.ckpt", ()), ("frozen.ckpt", ["loss."])):
        model = AutoencoderKL(**params, ckpt_path=str(tmp_path / name), ignore_keys=ignore)
        load_parts(model)
        assert all(torch.equal(model.state_dict()[key], value) for key, value in weights.items())


def test_the_config_for_stable_diffusion_v1():
    path = ROOT / "configs/autoencoder/kl-f8.yaml"
    config = to_plain(
        load_config(
            [path], [f"data.params.{s}.params.data_root=photos" for s in ("train", "validation")]
        )
    )
    check_config(config)
    params = config["model"]["params"]
    params["lossconfig"]["params"]["perceptual_weight"] = 0.0
    with torch.device("meta"):
        model = AutoencoderKL(**params)
    first_stage = {
        key: shape for key, shape in shapes(model).items() if not key.startswith("loss.")
    }
    assert first_stage == recorded_shapes("sd_v1_keys.json")
    assert model.monitor == "val/rec_loss" and config["lightning"]["trainer"]["max_steps"] > 50001
