"""Masks: found, cut with their photos, and what they leave of the loss."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.finding import find_images, list_images
from ldm.data.latents import CachedLatents
from ldm.data.personalized import PersonalizedBase
from ldm.errors import UserError
from ldm.modules.losses.per_sample import per_sample_loss, place_weights
from tests.support import runs
from tests.support.models import SIZE, batch, build, step
from tests.support.runs import Workspace, assert_resumes_exactly, metrics


def masked(root, shape=(20, 30), count=2, masks=(0,), suffix=".png"):
    """Photos of noise, of which some have a mask; photo and mask have the same values, which are
    large to the right.
    """
    random = np.random.default_rng(0)
    root.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        values = np.linspace(0, 255, shape[1])[None] * random.uniform(0.9, 1, shape)
        Image.fromarray(values.astype(np.uint8)).convert("RGB").save(root / f"{i:02}.png")
        if i in masks:
            Image.fromarray(values.astype(np.uint8)).save(root / f"{i:02}.mask{suffix}")
    return root


def photos(root, **params):
    return PersonalizedBase(
        root, **{"size": 16, "interpolation": "bilinear", "masks": True, **params}
    )


def test_a_mask_is_never_a_photo(tmp_path):
    root = masked(tmp_path, suffix=".PNG")
    (root / "00.mask.PNG").rename(root / "00.Mask.PNG")
    for found in (
        list_images(root),
        find_images(root),
        photos(root).paths,
        photos(root, masks=False).paths,
    ):
        assert [path.name for path in found] == ["00.png", "01.png"]
    assert "mask" not in photos(root, masks=False)[0]


@pytest.mark.parametrize(
    "params", [{}, {"resize": "center_crop"}, {"resize": "random_crop"}, {"size": None}]
)
def test_a_mask_goes_through_what_its_photo_does(tmp_path, params):
    dataset = photos(masked(tmp_path), **params)
    plain = photos(tmp_path, masks=False, **params)
    sides = set()
    for seed in range(12):
        item = dataset.example(0, torch.Generator().manual_seed(seed))
        # The photo has the mask's values: all that happens to one has to happen to the other.
        np.testing.assert_allclose(item["mask"], (item["image"][..., 0] + 1) / 2, atol=2 / 255)
        assert (
            item["mask"].dtype == np.float32 and 0 <= item["mask"].min() < item["mask"].max() <= 1
        )
        same_draws = plain.example(0, torch.Generator().manual_seed(seed))
        np.testing.assert_array_equal(item["image"], same_draws["image"])
        sides.add(bool(item["mask"][:, 0].mean() < item["mask"][:, -1].mean()))
    assert sides == {True, False}


def test_variants_are_what_is_drawn(tmp_path):
    dataset = photos(masked(tmp_path), flip_p=1.0)
    path = dataset.paths[0]
    drawn, variant = dataset.augmented(path), dict(dataset.variants())[path, True]
    dataset.flip_p = 0.0
    other = dict(dataset.variants())[path, False]
    for key in ("image", "mask"):
        np.testing.assert_array_equal(drawn[key], variant[key])
        np.testing.assert_array_equal(other[key], variant[key][:, ::-1])


def test_a_mask_stays_with_its_latent(tmp_path):
    run = runs.Workspace(tmp_path)
    run.photos = masked(tmp_path / "photos-masked", masks=(0, 1))
    masks = (
        "data.params.train.params.masks=true",
        "--max_steps",
        "3",
        "model.base_learning_rate=1e-4",
    )
    without, cached = (
        run.train(name, *masks, f"data.params.latent_cache={name}") for name in ("false", "true")
    )
    plain = run.train("plain", *masks[1:])
    found = [
        [float(row["train/loss"]) for row in metrics(folder)] for folder in (without, cached, plain)
    ]
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert found[2] != pytest.approx(found[0], rel=1e-3)


def test_without_a_mask_all_of_a_photo_counts(tmp_path):
    dataset = photos(masked(tmp_path))
    assert dataset[0]["mask"].min() < 0.5 and (dataset[1]["mask"] == 1).all()


def test_a_cut_out_as_a_mask(tmp_path):
    """Transparency counts nothing, whatever its colour; deeper greys keep their share."""
    root = masked(tmp_path, shape=(2, 3), count=1, masks=())
    pixels = np.full((2, 3, 4), 255, np.uint8)
    pixels[:, 0, 3] = 0
    Image.fromarray(pixels).save(root / "00.mask.png")
    assert photos(root, size=None, flip_p=0)[0]["mask"].tolist() == [[0, 1, 1]] * 2
    Image.fromarray(np.array([[0, 0x8080, 0xFFFF]] * 2, np.uint16)).save(root / "00.mask.png")
    np.testing.assert_allclose(
        photos(root, size=None, flip_p=0)[0]["mask"], [[0, 128 / 255, 1]] * 2
    )


def test_masks_that_cannot_be_used(tmp_path):
    root = masked(tmp_path, masks=())
    with pytest.raises(
        UserError,
        match=r"masks: true, but no mask in it; that of 01\.jpg is 01\.mask\.png beside it",
    ):
        photos(root)
    wide = np.zeros((20, 30), np.uint8)
    Image.fromarray(wide[:, :20]).save(root / "00.mask.png")
    with pytest.raises(UserError, match=r"00\.mask\.png: is 20x20, its image 00\.png 30x20 pixels"):
        photos(root).check()
    Image.fromarray(wide).save(root / "00.mask.png")
    for how in ("squash", "random_crop"):
        with pytest.raises(
            UserError, match=r"00\.mask\.png: this mask is all black; paint white what counts"
        ):
            photos(root, resize=how).check()
    wide[:, :3] = 255  # which the central square does not have
    Image.fromarray(wide).save(root / "00.mask.png")
    photos(root).check()
    with pytest.raises(UserError, match=r"00\.mask\.png: this mask is all black after cropping"):
        photos(root, resize="center_crop").check()
    Image.fromarray(wide).save(root / "00.mask.webp")
    with pytest.raises(
        UserError, match=r"00\.mask\.webp: 00\.png has another mask, 00\.mask\.png: remove one"
    ):
        photos(root)
    (root / "00.mask.webp").rename(root / "7.mask.webp")
    with pytest.raises(UserError, match=r"7\.mask\.webp: a mask without its image"):
        photos(root)
    (root / "7.mask.webp").unlink()
    (root / "00.mask.png").write_text("no image")
    with pytest.raises(UserError, match=r"00\.mask\.png: cannot read this image"):
        photos(root).check()


def test_masks_and_cached_latents_do_not_mix(tmp_path):
    config = {
        "target": "ldm.data.personalized.PersonalizedBase",
        "params": {"data_root": str(masked(tmp_path)), "masks": True},
    }
    with pytest.raises(UserError, match="masks are not cached with latents"):
        CachedLatents(tmp_path / "cache.safetensors", config)


# What they leave of the loss


def test_a_weighted_mean_of_the_error():
    output = torch.tensor([[1.0, 3.0], [2.0, 4.0]]).reshape(2, 1, 1, 2)
    target = torch.zeros(2, 1, 1, 2)
    weights = torch.tensor([[1.0, 0.0], [0.5, 1.5]]).reshape(2, 1, 2)
    assert per_sample_loss(output, target, weights=weights).tolist() == [
        1.0,
        (0.5 * 4 + 1.5 * 16) / 2,
    ]
    assert per_sample_loss(output, target, "l1", weights=torch.zeros(2, 1, 2)).tolist() == [
        0.0,
        0.0,
    ]
    random = torch.randn(2, 3, 4, 8, 8)
    assert torch.equal(
        per_sample_loss(*random, weights=torch.ones(3, 8, 8)), per_sample_loss(*random)
    )
    # Normalised: what is outside the mask changes nothing, and half as much area does not halve the
    # loss.
    half = torch.cat([torch.ones(3, 8, 4), torch.zeros(3, 8, 4)], dim=2)
    inside = per_sample_loss(*random[..., :4])
    torch.testing.assert_close(per_sample_loss(*random, weights=half), inside)


def test_weights_of_places():
    mask = torch.zeros(1, 16, 16)
    mask[:, :, :6] = 1  # of every third place of 2 pixels all, of none a part
    mask[:, 0, 6] = 1
    latents = [torch.zeros(1, 4, 8, 8), torch.zeros(2, 4, 8, 8)]
    assert place_weights([None, None], latents) is None
    weights = place_weights([mask, None], latents)
    assert weights.shape == (3, 8, 8) and (weights[1:] == 1).all()
    assert (
        weights[0, 0].tolist() == [1, 1, 1, 0.25, 0, 0, 0, 0]
        and weights[0, 1].tolist() == [1] * 3 + [0] * 5
    )
    floored = place_weights([mask, None], latents, 0.2)
    assert (floored[1:] == 1).all() and floored[0].min().item() == pytest.approx(0.2)
    assert floored[0, 0, 3].item() == pytest.approx(0.2 + 0.8 * 0.25)
    small = torch.rand(1, 8, 8)
    assert torch.equal(place_weights([small], latents[:1]), small)  # of the latents' size already


@torch.no_grad()
def test_only_the_masked_part_of_the_subject_counts(golden_model):
    subject, prior = batch(1), batch(11, caption="photo of a dog")
    mask = torch.ones(1, SIZE, SIZE)
    loss, logged = step(golden_model, subject, prior)
    white, _ = step(golden_model, subject | {"mask": mask}, prior)
    assert torch.equal(loss, white)
    half = mask.clone()
    half[:, :, SIZE // 2 :] = 0
    changed, changed_logged = step(golden_model, subject | {"mask": half}, prior)
    assert changed != loss and torch.equal(
        changed_logged["train/loss_prior"], logged["train/loss_prior"]
    )
    _, other_logged = step(golden_model, subject, prior | {"mask": half})
    assert other_logged["train/loss_prior"] != logged["train/loss_prior"]
    assert torch.equal(other_logged["train/loss"], logged["train/loss"])
    both = [step(golden_model, subject | {"mask": m})[0] for m in (half, 1 - half)]
    torch.testing.assert_close(sum(both) / 2, logged["train/loss"])  # of two halves of one size


@torch.no_grad()
def test_the_floor_of_the_mask(golden_model, monkeypatch):
    half = torch.ones(1, SIZE, SIZE)
    half[:, :, SIZE // 2 :] = 0
    losses = []
    for floor in (0.0, 0.5, 1.0):
        monkeypatch.setattr(
            golden_model, "objective", replace(golden_model.objective, unmasked_weight=floor)
        )
        losses.append(step(golden_model, batch(1) | {"mask": half})[0].item())
    black = step(build(), batch(1) | {"mask": 1 - half})[0].item()
    assert losses[2] == pytest.approx(step(golden_model, batch(1))[0].item(), rel=1e-6)
    assert losses[1] == pytest.approx((losses[0] + 0.5 * black) / 1.5, rel=1e-5)
    with pytest.raises(UserError, match=r"unmasked_weight: expected a share from 0 to 1, got 1\.5"):
        build(unmasked_weight=1.5)


def test_a_masked_run_resumes_exactly(tmp_path):
    workspace = Workspace(tmp_path)
    for number, photo in enumerate(sorted(workspace.photos.iterdir())[:2]):
        mask = np.zeros((40, 50), np.uint8)
        mask[:, : 20 + 10 * number] = 255
        Image.fromarray(mask).save(photo.with_suffix(".mask.png"))
    more = ("data.params.train.params.masks=true", "model.params.unmasked_weight=0.1")
    masked_run, _ = assert_resumes_exactly(workspace, "masked", *more)
    plain = workspace.train("plain", "--max_steps", "1")
    (row, *_), (other,) = metrics(masked_run), metrics(plain)
    assert row["train/loss_prior"] == other["train/loss_prior"]
