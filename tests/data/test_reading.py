"""Image files become pixels: the reference's numbers, and whatever surrounds the pixels."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data import reading
from ldm.data.image_folder import ImageFolderDataset
from ldm.data.personalized import PersonalizedBase
from ldm.data.reading import load_image
from ldm.data.resizing import resize, to_array
from ldm.errors import UserError
from tests.support.photos import encoded, picture, with_chunk, with_segment

DATA = Path(__file__).parent


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("flip0", {"flip_p": 0}),
        ("flip1", {"flip_p": 1}),
        ("center_crop", {"flip_p": 0, "center_crop": True}),
        ("center_crop", {"flip_p": 0, "resize": "center_crop"}),
        ("flip0", {"flip_p": 0, "resize": "squash"}),
        ("flip0_bilinear", {"flip_p": 0, "interpolation": "bilinear"}),
        ("flip0_linear", {"flip_p": 0, "interpolation": "linear"}),
        ("flip0_lanczos", {"flip_p": 0, "interpolation": "lanczos"}),
    ],
)
def test_images_equal_the_reference(one, golden, name, params):
    dataset = PersonalizedBase(one, size=64, **params)
    for index in (0, 1):  # the second comes from the cache
        image = dataset[index]["image"]
        assert image.dtype == np.float32
        np.testing.assert_array_equal(image, golden[f"data/{name}"])


def test_grey_image_equals_the_reference(one, golden):
    with Image.open(one / "image.png") as image:
        image.convert("L").save(one / "image.png")
    np.testing.assert_array_equal(
        PersonalizedBase(one, size=64, flip_p=0)[0]["image"], golden["data/gray_flip0"]
    )


def test_flips_follow_the_global_generator_as_in_the_reference(one, golden):
    dataset = PersonalizedBase(one, size=64, flip_p=0.5)
    torch.manual_seed(0)
    flipped = [np.array_equal(dataset[0]["image"], golden["data/flip1"]) for _ in range(16)]
    assert flipped == golden["data/flip_seed0_p0.5_seq"].tolist()
    draws = torch.Generator().manual_seed(0)
    again = [
        np.array_equal(dataset.example(0, draws)["image"], golden["data/flip1"]) for _ in range(16)
    ]
    assert again == flipped


def test_decoded_pixels(golden):
    np.testing.assert_array_equal(
        np.asarray(load_image(DATA / "data_100x80.png")), golden["data/png_rgb_u8"]
    )
    np.testing.assert_allclose(
        to_array(np.array([[[0, 51, 255]]], np.uint8)), [[[-1.0, -0.6, 1.0]]], rtol=1e-6
    )


def test_exif_rotation(tmp_path):
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[0, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "a.png")), np.rot90(pixels, -1))


def test_transparency_is_white(tmp_path):
    rgba = np.zeros((2, 3, 4), np.uint8)
    rgba[0, 0] = (255, 0, 0, 255)
    rgba[0, 1] = (0, 0, 0, 128)
    expected = np.full((2, 3, 3), 255)
    expected[0, 0] = (255, 0, 0)
    expected[0, 1] = 127
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    np.testing.assert_allclose(
        np.asarray(load_image(tmp_path / "rgba.png")).astype(int), expected, atol=1
    )

    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png", transparency=0)
    assert np.asarray(load_image(tmp_path / "p.png")).tolist() == [[[255, 255, 255], [10, 20, 30]]]


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_sixteen_bit_grey_is_scaled(tmp_path, ending):
    Image.fromarray(np.array([[0, 0x8000, 0xFFFF]], np.uint16)).save(tmp_path / f"a.{ending}")
    assert np.asarray(load_image(tmp_path / f"a.{ending}"))[0].tolist() == [
        [0] * 3,
        [128] * 3,
        [255] * 3,
    ]


def test_cmyk(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    red, green, blue = np.asarray(load_image(tmp_path / "a.jpg"))[0, 0]
    assert red > 200 and green < 60 and blue < 60


def test_random_crop_draws_only_when_there_is_a_choice():
    wide = Image.fromarray(np.arange(200, dtype=np.uint8).reshape(2, 100).repeat(2, 0))
    draws = torch.Generator().manual_seed(0)
    corners = {
        np.asarray(resize(wide, None, "random_crop", generator=draws))[0, 0].item()
        for _ in range(20)
    }
    assert len(corners) > 5
    state = draws.get_state()
    assert resize(wide.crop((0, 0, 4, 4)), 2, "random_crop", generator=draws).size == (2, 2)
    assert torch.equal(draws.get_state(), state)


def test_image_folder_for_the_autoencoder(one, golden):
    dataset = ImageFolderDataset(one, size=64)
    assert len(dataset) == 1
    assert dataset[0].keys() == {"image"}
    np.testing.assert_array_equal(dataset[0]["image"], golden["data/center_crop"])
    with pytest.raises(IndexError):
        dataset[1]


def broken_files(root: Path) -> list[Path]:
    noise = np.random.RandomState(0).randint(0, 256, (64, 64, 3), np.uint8)
    for name in ("truncated.jpg", "truncated.png"):
        Image.fromarray(noise).save(root / name)
        content = (root / name).read_bytes()
        (root / name).write_bytes(content[: len(content) // 2])
    (root / "text.jpg").write_text("not an image")
    (root / "zero.png").touch()
    Image.fromarray(np.ones((4, 4), np.float32)).save(root / "float.tif")
    return sorted(root.iterdir())


def test_broken_images_are_named(tmp_path):
    paths = broken_files(tmp_path)
    assert len(paths) == 5
    for path in paths:
        with pytest.raises(UserError, match=path.name) as error:
            load_image(path)
        assert "\n" not in str(error.value)


# metadata


LARGE = zlib.compress(b"x" * (2 << 20))
EXIF = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"  # turned to the right
DAMAGED_PNG = {
    "large text": (b"zTXt", b"workflow\0\0" + LARGE),
    "large international text": (b"iTXt", b"workflow\0\1\0\0\0" + LARGE),
    "large profile": (b"iCCP", b"profile\0\0" + LARGE),
    "empty profile": (b"iCCP", b""),
    "profile packed in an unknown way": (b"iCCP", b"profile\0\5garbage"),
    "short gamma": (b"gAMA", b""),
    "short size": (b"pHYs", b"1"),
    "short animation": (b"acTL", b"12"),
    "cut EXIF": (b"eXIf", EXIF[:14]),
    "EXIF of something else": (b"eXIf", b"garbage"),
}
DAMAGED_JPEG = {
    "cut EXIF": (0xE1, b"Exif\0\0" + EXIF[:14]),
    "EXIF of something else": (0xE1, b"Exif\0\0garbage"),
    "short profile": (0xE2, b"ICC_PROFILE\0\x09"),
    "garbage as profile": (0xE2, b"ICC_PROFILE\0\1\1garbage"),
    "garbage as second picture": (0xE2, b"MPF\0garbage"),
    "short JFIF": (0xE0, b"JFIF\0"),
    "short colour mode": (0xEE, b"Adobe"),
    "Photoshop's": (0xED, b"Photoshop 3.0\x008BIMgarbage"),
    "long comment": (0xFE, b"x" * 60000),
}


def same_pixels(path: Path, content: bytes, expected: Image.Image) -> bool:
    path.write_bytes(content)
    return np.array_equal(np.asarray(load_image(path)), np.asarray(expected))


@pytest.mark.parametrize("what", DAMAGED_PNG)
@pytest.mark.parametrize("checksum", [True, False], ids=["", "wrong checksum"])
def test_png_metadata_does_not_matter(tmp_path, recwarn, what, checksum):
    kind, content = DAMAGED_PNG[what]
    png = with_chunk(encoded(picture(), "PNG"), kind, content, damaged=not checksum)
    assert same_pixels(tmp_path / "a.png", png, picture())
    assert not recwarn.list


@pytest.mark.parametrize("what", DAMAGED_JPEG)
def test_jpeg_metadata_does_not_matter(tmp_path, recwarn, what):
    plain = encoded(picture(), "JPEG")
    (tmp_path / "plain.jpg").write_bytes(plain)
    expected = load_image(tmp_path / "plain.jpg")
    assert same_pixels(tmp_path / "a.jpg", with_segment(plain, *DAMAGED_JPEG[what]), expected)
    assert not recwarn.list


def test_texts_of_many_megabytes(tmp_path):
    png = encoded(picture(), "PNG")
    for number in range(70):  # Pillow's limit is 64 MB
        png = with_chunk(png, b"zTXt", b"%d\0\0" % number + zlib.compress(b"x" * (1 << 20)))
    assert same_pixels(tmp_path / "a.png", png, picture())


def test_orientation_survives_damaged_metadata(tmp_path):
    png = with_chunk(encoded(picture(), "PNG"), b"eXIf", EXIF)
    turned = picture().transpose(Image.Transpose.ROTATE_270)
    assert same_pixels(tmp_path / "whole.png", png, turned)
    assert same_pixels(tmp_path / "large.png", with_chunk(png, b"zTXt", b"a\0\0" + LARGE), turned)


def test_bytes_behind_the_end_do_not_matter(tmp_path):
    png = encoded(picture(), "PNG")
    assert same_pixels(tmp_path / "a.png", png + b"junk" * 99, picture())
    assert same_pixels(tmp_path / "b.png", png[:-12] + b"junk" * 99, picture())


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("large", [False, True])
def test_cut_pixels_are_an_error_whatever_the_metadata(tmp_path, kind, large):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    content = encoded(Image.fromarray(noise), kind)
    if large and kind == "PNG":
        content = with_chunk(content, b"zTXt", b"a\0\0" + LARGE)
    if large and kind == "JPEG":
        content = with_segment(content, 0xE0, b"JFIF\0")
    (path := tmp_path / "cut.png").write_bytes(content[: -len(content) // 4])
    with pytest.raises(UserError, match=r"cut\.png: cannot read this image"):
        load_image(path)


# other files


FOREIGN = {
    "empty": (b"", "is empty"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "page": (b"\n<!DOCTYPE html><html>404", "a web page"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
    "jxl": (b"\xff\x0a" + bytes(30), "JPEG XL"),
    "psd": (b"8BPS\0\1" + bytes(30), "Photoshop"),
    "video": (b"\0\0\0\x18ftypmp42\0\0\0\0", "a video"),
    "tiff": (b"II*\0\x08\0\0\0\0\0", "a TIFF"),
    "text": (b"not a picture", "no image format"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_what_is_no_image_is_named(tmp_path, what):
    content, words = FOREIGN[what]
    (path := tmp_path / "photo.jpg").write_bytes(content)
    with pytest.raises(
        UserError, match=rf"photo\.jpg: cannot read this image \(.*{words}"
    ) as error:
        load_image(path)
    assert "\n" not in str(error.value)


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.jpg: .*there is no such file"):
        load_image(tmp_path / "none.jpg")
    with pytest.raises(UserError, match="it is a folder"):
        load_image(tmp_path)


def test_a_link_to_nothing_is_named(tmp_path):
    (tmp_path / "a.jpg").symlink_to(tmp_path / "gone.jpg")
    dataset = ImageFolderDataset(tmp_path, size=8)
    with pytest.raises(UserError, match=r"a\.jpg: .*a link to a file that is gone"):
        dataset.check()


@pytest.mark.parametrize(
    "kind, ending", [("GIF", "gif"), ("WEBP", "webp"), ("PNG", "png"), ("TIFF", "tif")]
)
def test_the_first_of_several_frames_is_read_and_said(tmp_path, caplog, kind, ending):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(path := tmp_path / f"a.{ending}", kind, save_all=True, append_images=frames[1:])
    assert np.asarray(load_image(path)).astype(int)[4, 4] == pytest.approx([255, 0, 0], abs=3)
    assert f"{path}: of its 3 frames, the first one is read" in caplog.text


def test_the_second_picture_of_a_camera_is_not_worth_a_word(tmp_path, caplog):
    picture().save(
        path := tmp_path / "a.jpg", "MPO", save_all=True, append_images=[picture(turn=90)]
    )
    assert load_image(path).size == picture().size
    assert not caplog.records


def test_avif(tmp_path):
    Image.new("RGB", (16, 16), "red").save(path := tmp_path / "a.avif", quality=95)
    assert np.asarray(load_image(path)).astype(int)[8, 8] == pytest.approx([255, 0, 0], abs=6)


# very many pixels


@pytest.fixture
def limit(monkeypatch):
    """Let 10 000 pixels be too many, as 179 million are."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5_000)
    monkeypatch.setattr(reading, "MOST_PIXELS", 10_000)


@pytest.mark.parametrize("width, part", [(140, 2), (280, 4), (1000, 8)])
def test_a_very_large_jpeg_is_read_at_a_part_of_its_size(tmp_path, limit, caplog, width, part):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(width, 100).save(path := tmp_path / "a.jpg", exif=exif, quality=95)
    image = load_image(path)
    assert image.size == (-(-100 // part), -(-width // part))  # turned
    upright = picture(width, 100).transpose(Image.Transpose.ROTATE_270).resize(image.size)
    assert np.abs(np.asarray(image).astype(int) - np.asarray(upright)).mean() < 10
    assert f"{path}: 0 megapixels; read at 1/{part} of its width and height" in caplog.text


def test_a_very_large_png_is_refused_in_a_line(tmp_path, limit):
    picture(140, 100).save(path := tmp_path / "a.png")
    with pytest.raises(
        UserError, match=r"a\.png: 0 megapixels, and 0 megapixels are the most: save it"
    ):
        load_image(path)


def test_the_limit_is_pillows():
    assert reading.MOST_PIXELS == 2 * Image.MAX_IMAGE_PIXELS


def test_every_image_of_a_large_set_is_checked_and_decoded_once(tmp_path, monkeypatch):
    for number in range(70):
        picture(turn=number).save(tmp_path / f"{number:03}.png")
    decoded = []
    load = reading.load_image
    monkeypatch.setattr(
        "ldm.data.image_folder.load_image", lambda path: decoded.append(path) or load(path)
    )
    dataset = ImageFolderDataset(tmp_path, size=8)
    assert len(dataset.check()) == 70
    dataset.check()
    dataset.example(69)
    assert len(decoded) == 70
    (tmp_path / "069.png").write_bytes(encoded(picture(turn=69), "PNG")[:-40])
    with pytest.raises(UserError, match=r"069\.png"):
        ImageFolderDataset(tmp_path, size=8).check()
