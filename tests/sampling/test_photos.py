"""Photos and masks: what is cut out, at what size, and how it is put back."""

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.errors import UserError
from ldm.sampling import photos
from ldm.sampling.photos import (
    central_box,
    drawn_size,
    inward_weights,
    mask_of_box,
    mask_tensor,
    paste,
    read_mask,
    read_photo,
    region_of,
    region_size,
)
from tests.support.photos import picture


def mask(size, *box):
    """A mask of one white rectangle: left, top, right, lower."""
    found = Image.new("L", size, 0)
    found.paste(255, box)
    return found


# Cutting


@pytest.mark.parametrize(
    "size, box, region",
    [
        ((400, 300), (180, 140, 220, 160), (136, 86, 264, 214)),  # as large as the model draws
        ((400, 300), (0, 0, 10, 10), (0, 0, 128, 128)),  # in a corner
        ((400, 300), (100, 50, 300, 250), (64, 14, 336, 286)),  # larger: with the padding
        ((400, 300), (0, 0, 400, 300), (0, 0, 400, 300)),  # all of it
        ((100, 300), (40, 10, 60, 20), (0, 0, 100, 128)),  # a photo that is narrower
    ],
)
def test_the_region_is_the_mask_and_what_is_around_it(size, box, region):
    found = region_of(mask(size, *box), 36, (128, 128))
    assert found == region
    assert found[0] <= box[0] and found[1] <= box[1] and found[2] >= box[2] and found[3] >= box[3]


def test_sizes_are_multiples_near_the_models_own():
    assert region_size((0, 0, 128, 128), (512, 512), 64) == (512, 512)
    assert region_size((0, 0, 100, 128), (512, 512), 64) == (384, 512)
    assert region_size((0, 0, 2000, 10), (512, 512), 64) == (512, 64)
    assert drawn_size((4000, 3000), 512, 64) == (704, 512)
    assert drawn_size((200, 200), 512, 64) == (512, 512)


def test_a_crop_keeps_the_proportions_and_the_middle():
    assert central_box((400, 300), (64, 64)) == (50, 0, 350, 300)
    assert central_box((400, 300), (128, 96)) is None


# Masks


def test_masks_are_black_and_white_and_as_large_as_their_photo(tmp_path):
    grey = Image.new("L", (24, 16), 127)
    grey.paste(128, (2, 2, 6, 6))
    grey.save(tmp_path / "mask.png")
    found = read_mask(tmp_path / "mask.png", tmp_path / "photo.jpg", (24, 16))
    assert found.getbbox() == (2, 2, 6, 6) and set(found.getdata()) == {0, 255}
    with pytest.raises(UserError, match=r"is 24x16, its image photo\.jpg 16x24 pixels"):
        read_mask(tmp_path / "mask.png", tmp_path / "photo.jpg", (16, 24))
    Image.new("L", (24, 16), 127).save(tmp_path / "dark.png")
    with pytest.raises(UserError, match=r"dark\.png: nothing in this mask is white"):
        read_mask(tmp_path / "dark.png", tmp_path / "photo.jpg", (24, 16))


def test_a_box_is_inside_the_photo():
    assert mask_of_box([2, 3, 4, 5], (24, 16)).getbbox() == (2, 3, 6, 8)
    for box in ([20, 0, 5, 5], [-1, 0, 5, 5], [0, 0, 0, 5], [0, 12, 5, 5]):
        with pytest.raises(UserError, match="is not inside the photo of 24x16 pixels"):
            mask_of_box(box, (24, 16))


def test_a_thin_stroke_is_not_lost_when_a_mask_shrinks():
    found = mask_tensor(mask((128, 128), 70, 0, 71, 128), (16, 16))
    assert found.shape == (1, 1, 16, 16) and set(found.unique().tolist()) == {0.0, 1.0}
    assert found[0, 0].sum(dim=1).tolist() == [1.0] * 16


def test_photos_are_turned_and_what_is_transparent_is_white(tmp_path, caplog):
    caplog.set_level("INFO")
    image = picture()
    exif = Image.Exif()
    exif[0x0112] = 6  # held upright
    image.save(tmp_path / "turned.png", exif=exif)
    assert read_photo(tmp_path / "turned.png").size == (16, 24)
    clear = image.convert("RGBA")
    clear.putalpha(0)
    clear.save(tmp_path / "clear.png")
    assert read_photo(tmp_path / "clear.png").getextrema() == ((255, 255),) * 3
    assert "clear.png: its transparent parts are taken as white" in caplog.text


# Pasting


def test_weights_rise_from_the_border_inwards():
    weights = inward_weights(np.asarray(mask((20, 20), 4, 4, 16, 16)), 3)
    assert weights[10].tolist() == [0.0] * 4 + [0.25, 0.5, 0.75] + [1.0] * 6 + [
        0.75, 0.5, 0.25, 0.0, 0.0, 0.0, 0.0,
    ]  # fmt: skip
    assert set(np.unique(inward_weights(np.asarray(mask((20, 20), 4, 4, 16, 16)), 0))) == {0.0, 1.0}


def test_a_thin_mask_still_shows_what_is_painted():
    weights = inward_weights(np.asarray(mask((20, 20), 4, 4, 7, 16)), 8)
    assert weights[10].tolist()[3:8] == [0.0, 0.5, 1.0, 0.5, 0.0]


def test_a_mask_of_the_whole_photo_has_no_border_to_look_for(monkeypatch):
    calls, pool = [], photos.F.max_pool2d
    monkeypatch.setattr(
        photos.F, "max_pool2d", lambda *given, **more: calls.append(1) or pool(*given, **more)
    )
    assert (inward_weights(np.full((20, 20), 255, np.uint8), 50) == 1).all()
    assert len(calls) == 1


def test_at_the_photos_own_border_nothing_fades():
    weights = inward_weights(np.asarray(mask((20, 20), 0, 0, 10, 20)), 4)
    assert (weights[:, :6] == 1).all() and weights[0, 9] < 1


@pytest.mark.parametrize("scale", [1, 2])
def test_outside_the_mask_the_photo_is_the_same_to_the_bit(scale):
    photo, where = picture(40, 30), mask((40, 30), 10, 8, 26, 22)
    region = (4, 2, 36, 28)
    painted = Image.new("RGB", (32 * scale, 26 * scale), (10, 200, 30))
    result = np.asarray(paste(photo, painted, where, region, 3))
    outside = np.asarray(where) == 0
    assert (result[outside] == np.asarray(photo)[outside]).all()
    assert (result[12:18, 15:21] == (10, 200, 30)).all()


def jumps(pixels, inside):
    """The largest differences of neighbours that a mask's border parts."""
    pixels = pixels.astype(int)
    found = []
    for axis in (0, 1):
        across = np.diff(inside.astype(int), axis=axis) != 0
        found.append(np.abs(np.diff(pixels, axis=axis)).max(axis=-1)[across])
    return np.concatenate(found)


def test_a_soft_border_has_no_seam_where_a_hard_one_has():
    photo = Image.new("RGB", (64, 64), (100, 110, 120))
    where = Image.new("L", (64, 64), 0)
    where.paste(255, (16, 16, 48, 48))
    painted = Image.new("RGB", (64, 64), (160, 110, 60))
    inside = np.asarray(where) > 0
    soft, hard = (np.asarray(paste(photo, painted, where, (0, 0, 64, 64), blur)) for blur in (9, 0))
    assert jumps(hard, inside).max() == 60
    assert jumps(soft, inside).max() <= 6
    # Nor has it one further inside.
    for axis in (0, 1):
        assert np.abs(np.diff(soft.astype(int), axis=axis)).max() <= 6


def test_masks_at_another_size_are_tensors_of_zeros_and_ones():
    found = mask_tensor(mask((10, 10), 0, 0, 5, 10), (40, 20))
    assert found.shape == (1, 1, 20, 40)
    assert torch.equal(found[0, 0, 0], torch.cat([torch.ones(20), torch.zeros(20)]))
