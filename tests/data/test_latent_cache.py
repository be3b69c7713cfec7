"""Latents that are encoded once: the same numbers as without, in memory and on disk."""

import pytest
import torch

from ldm.data.image_folder import ImageFolderDataset
from ldm.models.autoencoder import AutoencoderKL
from tests.support import runs
from tests.support.runs import checkpoint, metrics, same

STEPS = 16
SLOW = "model.base_learning_rate=1e-4"  # else the steps make much of the last digits of an encoding


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return runs.Workspace(tmp_path_factory.mktemp("latents"))


@pytest.fixture(scope="module")
def uncached(workspace):
    never = "data.params.latent_cache=false"
    return workspace.train("uncached", SLOW, never, "--max_steps", str(STEPS))


def losses(run):
    found = metrics(run)
    return [
        [float(row[name]) for name in ("train/loss", "train/loss_prior", "train/loss_total")]
        for row in found
    ]


@pytest.fixture
def encoded(monkeypatch):
    """How many images the first stage has encoded."""
    count, encode = [0], AutoencoderKL.encode

    def counting(self, x):
        count[0] += len(x)
        return encode(self, x)

    monkeypatch.setattr(AutoencoderKL, "encode", counting)
    return count


def test_losses_are_those_of_the_uncached_run(workspace, uncached, encoded):
    run = workspace.train(
        "cached", SLOW, "data.params.latent_cache=true", "--max_steps", str(STEPS)
    )
    assert encoded == [2 * (3 + 4)]  # each photo and class image, and their mirrors
    with_cache, without = losses(run), losses(uncached)
    assert len(with_cache) == STEPS
    torch.testing.assert_close(
        torch.tensor(with_cache), torch.tensor(without), rtol=1e-4, atol=1e-6
    )
    # Flipped pictures and posterior noise are in these numbers: other ones would not agree.
    other = workspace.train(
        "other", "data.params.latent_cache=true", "--max_steps", "2", "-s", "24"
    )
    assert abs(losses(other)[0][0] - without[0][0]) > 1e-3


def test_only_what_flips_is_encoded_twice(workspace, encoded):
    never, always = "data.params.train.params.flip_p=0", "data.params.reg.params.flip_p=1"
    workspace.train("flips", "data.params.latent_cache=true", "--max_steps", "1", never, always)
    assert encoded == [3 + 4]


def test_a_folder_keeps_them_for_later_runs(workspace, encoded, caplog):
    folder = workspace.path / "latents"
    cached = (f"data.params.latent_cache={folder}", "--max_steps", "3")
    first = workspace.train("folder", *cached)
    assert encoded == [14] and len(list(folder.iterdir())) == 14
    again = workspace.train("folder-again", *cached)
    assert encoded == [14]
    assert same(checkpoint(first)["state_dict"], checkpoint(again)["state_dict"])
    # Half a file is not a cache, and another size has other latents.
    broken = sorted(folder.iterdir())[0]
    broken.write_bytes(broken.read_bytes()[:100])
    workspace.train("folder-broken", *cached)
    assert encoded == [15] and f"{broken}: not a cached latent" in caplog.text
    workspace.train(
        "folder-size", *cached, "data.params.train.params.size=64", "data.params.reg.params.size=64"
    )
    assert encoded == [15 + 14]


def test_a_resumed_run_repeats_the_uninterrupted_one(workspace):
    straight = workspace.train("straight", "data.params.latent_cache=true", "--max_steps", "5")
    parts = workspace.train("parts", "data.params.latent_cache=true", "--max_steps", "3")
    workspace.resume(parts, "--max_steps", "5")
    ours, theirs = checkpoint(parts), checkpoint(straight)
    assert ours["global_step"] == 5
    assert same(ours["state_dict"], theirs["state_dict"])
    assert same(ours["optimizer_states"], theirs["optimizer_states"])


def test_what_shows_another_picture_each_time_is_refused(workspace, caplog):
    arguments = workspace.arguments(
        "crop", "data.params.latent_cache=true", "data.params.train.params.resize=random_crop"
    )
    assert runs.main.main(arguments) == 1
    assert "latent_cache: train.params.resize: random_crop" in caplog.text
    assert not list(workspace.logs.glob("*_crop"))


def test_variants_are_what_examples_are_made_of(workspace):
    dataset = ImageFolderDataset(workspace.photos, size=8, flip_p=0.5)
    variants = {entries["image"].tobytes() for _, entries in dataset.variants()}
    seen = {
        dataset.example(n, torch.Generator().manual_seed(n))["image"].tobytes() for n in range(40)
    }
    assert len(variants) == 6 and seen == variants
