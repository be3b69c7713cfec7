"""What subject and class images have in common is refused or said, before anything is made."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from ldm.data.datamodule import DataModuleFromConfig
from ldm.errors import UserError
from tests.support.photos import folder, picture

PERSONALIZED = "ldm.data.personalized.PersonalizedBase"


def module(subject: Path, prior: Path, **params) -> DataModuleFromConfig:
    train, reg = (
        {
            "target": PERSONALIZED,
            "params": {"data_root": str(root), "size": 8, "reg": root is prior},
        }
        for root in (subject, prior)
    )
    return DataModuleFromConfig(1, train=train, reg=reg, num_workers=0, **params)


@pytest.fixture
def photos(tmp_path):
    return folder(tmp_path / "photos", 2)


@pytest.mark.parametrize("count", [0, 2, 9])
@pytest.mark.parametrize("exists", [True, False])
def test_class_images_in_the_subjects_folder(photos, count, exists):
    prior = photos / "class" / "dog"
    if exists:
        folder(prior, 2, first=5)
    elif not count:
        return
    with pytest.raises(
        UserError, match=r"class/dog: the class images lie in the subject's folder .*photos"
    ):
        module(photos, prior, num_class_images=count)
    assert exists or not prior.exists()


def test_subject_in_the_folder_of_class_images(tmp_path, photos):
    with pytest.raises(
        UserError, match="photos: the subject's photos lie in the folder of the class images"
    ):
        module(photos, tmp_path)


@pytest.mark.parametrize("link", [False, True])
def test_one_folder_for_both(tmp_path, photos, link):
    if link:
        (tmp_path / "class").symlink_to(photos)
    with pytest.raises(UserError, match="is the folder of both"):
        module(photos, tmp_path / "class" if link else photos)


def test_a_linked_folder_inside(tmp_path, photos):
    (photos / "more").symlink_to(folder(tmp_path / "class", 2, first=5))
    with pytest.raises(UserError, match="class: the class images lie in the subject's folder"):
        module(photos, tmp_path / "class")


def test_a_hidden_folder_inside_is_none_of_the_subjects(photos):
    data = module(photos, folder(photos / ".class", 2, first=5))
    assert data.summary()["subject_images"] == data.summary()["class_images"] == 2


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_linked_files(tmp_path, photos, link):
    prior = folder(tmp_path / "class", 2, first=5)
    link(photos / "01.png", prior / "09.png")
    with pytest.raises(UserError, match=r"photos/01\.png and .*class/09\.png: one file"):
        module(photos, prior)


def test_copies_are_said(tmp_path, photos, caplog):
    prior = folder(tmp_path / "class", 2, first=5)
    module(photos, prior).check()
    assert not caplog.records
    shutil.copy(photos / "00.png", prior / "copy.png")
    picture().save(photos / "a.png")
    picture().save(prior / "a.bmp")  # the same pixels in another file
    module(photos, prior).check()
    assert "a.bmp (and 1 more): one picture, as the subject and as its class" in caplog.text


def test_class_images_that_are_there_are_checked_before_more_are_made(tmp_path, photos):
    prior = folder(tmp_path / "class", 2, first=5)
    (prior / "02.jpg").write_text("no picture")
    data = module(photos, prior, num_class_images=9)
    assert data.summary()["class_images_to_make"] == 6
    with pytest.raises(UserError, match=r"02\.jpg"):
        data.check()
