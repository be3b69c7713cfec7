"""Which files of a folder are taken for images."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ldm.data.finding import find_images, is_searched, list_images
from ldm.data.personalized import PersonalizedBase
from ldm.errors import UserError
from tests.support.photos import encoded, folder, picture


def test_find_images_is_recursive_sorted_and_skips_hidden(tmp_path):
    wanted = ["B.JPG", "a.png", "sub/c.WebP", "sub/d.tiff"]
    for name in [*wanted, ".hidden.png", ".cache/e.png", "a.txt", "notes.md"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path)] == wanted


def test_folder_errors(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "phone").mkdir()
    (tmp_path / "phone" / "a.HEIC").touch()
    (tmp_path / "file.png").touch()
    for name, reason in {
        "missing": "no such folder",
        "empty": "no image in it",
        "phone": r"found only \.heic",
        "file.png": "is a file",
    }.items():
        with pytest.raises(UserError, match=rf"{name}: .*{reason}.*\.jpg"):
            PersonalizedBase(tmp_path / name, size=8)
    with pytest.raises(UserError, match=" --data_root"):
        PersonalizedBase(size=8)
    with pytest.raises(UserError, match=" --reg_data_root"):
        PersonalizedBase(size=8, reg=True)


def names(root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in find_images(root)]


@pytest.mark.parametrize(
    "thumbnail",
    [
        "@eaDir/01.jpg/SYNOPHOTO_THUMB_XL.jpg",
        "sub/@eadir/01.jpg",
        ".thumbnails/01.png",
        ".@__thumb/01.jpg",
        ".AppleDouble/01.jpg",
        "__MACOSX/._01.jpg",
        "__MACOSX/01.jpg",
        ".ipynb_checkpoints/01-checkpoint.png",
        "$RECYCLE.BIN/01.jpg",
        "#recycle/01.jpg",
        "._01.jpg",
        "Thumbs.db",
    ],
)
def test_what_file_systems_put_there_is_no_photo(tmp_path, thumbnail):
    picture().save(tmp_path / "01.png")
    (tmp_path / thumbnail).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / thumbnail).write_bytes(encoded(picture(), "PNG"))
    assert names(tmp_path) == ["01.png"]


def test_a_user_may_choose_such_a_folder(tmp_path):
    folder(tmp_path / "@eaDir", 2)
    assert len(find_images(tmp_path / "@eaDir")) == 2


def test_linked_folders_are_searched_each_once(tmp_path):
    folder(tmp_path / "elsewhere", 2)
    folder(tmp_path / "photos", 1)
    folder(tmp_path / "photos" / "z", 1)
    (tmp_path / "photos" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "again").symlink_to("linked")
    (tmp_path / "photos" / "a").symlink_to("z")
    found = names(tmp_path / "photos")
    assert [name for name in found if "z" in name or "/" not in name] == ["00.png", "z/00.png"]
    assert len(found) == 4


def test_links_in_circles_end(tmp_path):
    root = folder(tmp_path / "photos", 1)
    (tmp_path / "outside.png").write_bytes(encoded(picture(), "PNG"))
    (root / "self").symlink_to(".")
    (root / "own").symlink_to("own")
    (root / "up").symlink_to("..")
    (root / "sub").mkdir()
    (root / "sub" / "back").symlink_to(root)
    other = folder(tmp_path / "other", 1)
    (other / "there").symlink_to(root)
    (root / "other").symlink_to(other)
    assert names(root) == ["00.png", "other/00.png"]


def test_pipes_are_left_alone(tmp_path):
    picture().save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.png")
    assert names(tmp_path) == ["a.png"]


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    folder(tmp_path / "photos", 1)
    (tmp_path / "photos" / "locked").mkdir()
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(
        UserError, match=r"locked: cannot look into this folder \(Permission denied\)"
    ):
        find_images(tmp_path / "photos")


def test_photos_that_are_not_read_are_said(tmp_path, caplog):
    picture().save(tmp_path / "a.png")
    for name in ("b.HEIC", "c.dng", "d.heic"):
        (tmp_path / name).write_bytes(b"photo")
    (tmp_path / "e").write_bytes(encoded(picture(), "JPEG"))
    (tmp_path / "f.jpg_large").write_bytes(encoded(picture(), "JPEG"))
    (tmp_path / "notes.txt").write_text("no photo")
    assert names(tmp_path) == ["a.png"]
    heic, renamed = [record.getMessage() for record in caplog.records]
    assert (
        heic == f"{tmp_path}: 3 files ending in .dng .heic are skipped; save them as .png or .jpg"
    )
    assert renamed.startswith(f"{tmp_path / 'e'} and 1 more: JPEG by content")
    find_images(tmp_path)  # of another dataset on the same folder
    assert len(caplog.records) == 2


def test_subfolders_of_the_subject_are_said(tmp_path, caplog):
    folder(tmp_path / "photos", 2)
    folder(tmp_path / "photos" / "more", 3)
    PersonalizedBase(tmp_path / "photos", size=8, reg=True)
    PersonalizedBase(tmp_path / "photos" / "more", size=8)
    assert not caplog.records
    PersonalizedBase(tmp_path / "photos", size=8)
    assert (
        "3 of its 5 images are in subfolders (more): all are taken for the subject" in caplog.text
    )


def test_is_searched(tmp_path):
    (tmp_path / "photos" / "sub").mkdir(parents=True)
    photos = tmp_path / "photos"
    assert is_searched(photos, photos) and is_searched(photos, photos / "sub")
    assert is_searched(photos, photos / "sub" / "not" / "yet")
    assert not is_searched(photos / "sub", photos)
    assert not is_searched(photos, photos / ".hidden" / "yet")
    assert not is_searched(tmp_path / "none", photos)
    (tmp_path / "elsewhere").mkdir()
    (photos / "link").symlink_to(tmp_path / "elsewhere")
    assert is_searched(photos, tmp_path / "elsewhere")
    assert list_images(tmp_path / "none") == []
