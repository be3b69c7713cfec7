"""Images of a large folder are decoded once, and known by their content at the next start."""

import pytest

from ldm.data import checked, image_folder
from ldm.data.image_folder import ImageFolderDataset
from ldm.errors import UserError
from tests.support.runs import pictures


@pytest.fixture
def decoded(tmp_path, monkeypatch):
    """The names of the files that were decoded, by threads and so in any order."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(image_folder, "LONG_CHECK", 4)
    names, load = [], image_folder.load_image
    monkeypatch.setattr(
        image_folder, "load_image", lambda path: names.append(path.name) or load(path)
    )
    return names


def check(folder, **more):
    return ImageFolderDataset(folder, size=8, **more).check()


def test_what_was_decoded_once_is_known_by_its_content(tmp_path, decoded):
    folder = pictures(tmp_path / "photos", 5)
    first = check(folder)
    assert sorted(decoded) == [f"{number}.png" for number in range(5)]
    decoded.clear()
    assert check(folder) == first and not decoded
    # Neither a name nor a date counts, but every byte does.
    (folder / "0.png").rename(folder / "other.png")
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes() + b"\0")
    found = check(folder)
    assert decoded == ["1.png"] and found[folder / "other.png"] == first[folder / "0.png"]
    assert found[folder / "1.png"] == first[folder / "1.png"], "the pixels are the same"
    assert {path.parent for path in folder.rglob("*")} == {folder}, "nothing else is beside them"


def test_an_image_that_does_not_decode_is_never_known(tmp_path, decoded):
    folder = pictures(tmp_path / "photos", 5)
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:60])
    for _ in range(2):
        decoded.clear()
        with pytest.raises(UserError, match=r"3\.png"):
            check(folder)
        assert "3.png" in decoded


def test_a_few_images_leave_no_file(tmp_path, decoded):
    check(pictures(tmp_path / "photos", 3))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("content", ["", "{", '{"decoder": "older", "pixels": {}}', "[]"])
def test_a_cache_that_cannot_be_read_or_written_is_done_without(tmp_path, decoded, content):
    folder = pictures(tmp_path / "photos", 4)
    place = checked.CheckedImages(folder).path
    place.parent.mkdir(parents=True)
    place.write_text(content)
    check(folder)
    assert len(decoded) == 4
    place.unlink()
    place.mkdir()  # a file cannot take its place
    check(folder)
    assert len(decoded) == 8


def test_masks_are_looked_at_each_time(tmp_path, decoded):
    folder = pictures(tmp_path / "photos", 4)
    (folder / "0.mask.png").write_bytes((folder / "1.png").read_bytes())
    for number in (4, 8):
        check(folder, masks=True)
        assert len(decoded) == number
