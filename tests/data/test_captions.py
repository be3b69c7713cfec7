"""Captions: from templates, and from files beside the images."""

from __future__ import annotations

import pytest
import torch

from ldm.data.captions import read_captions
from ldm.data.personalized import PersonalizedBase
from ldm.data.prompts import captions_from_templates, class_word_of
from ldm.errors import ParameterError, UserError
from tests.support.photos import folder


def test_captions_equal_the_reference(one, meta):
    caption = {
        "train": PersonalizedBase(one, size=64)[0]["caption"],
        "reg": PersonalizedBase(one, size=64, reg=True)[0]["caption"],
        "coarse": PersonalizedBase(one, size=64, coarse_class_text="big")[0]["caption"],
    }
    assert caption == {name: meta[f"data_caption_{name}"] for name in caption}
    bare = [
        captions_from_templates(templates=meta["data_templates"][name])[0]
        for name in ("train", "reg")
    ]
    assert bare == [meta["data_caption_train"], meta["data_caption_reg"]]


def test_identifier_and_templates(one):
    given = {
        "identifier": "zwx",
        "templates": ["a {class_word} named {identifier}", "one {}"],
        "placeholder_token": "cat",
    }
    dataset = PersonalizedBase(one, size=8, **given)
    assert dataset.prompts == ["a cat named zwx", "one cat"]
    torch.manual_seed(0)
    assert {dataset[0]["caption"] for _ in range(20)} == set(dataset.prompts)


@pytest.mark.parametrize(
    "template", ["photo of {clas_word}", "photo of {", "photo of {0}", "{class_word:d}", 3]
)
def test_bad_template(template):
    with pytest.raises(UserError, match=r"templates: .*\{identifier\}, \{class_word\}"):
        captions_from_templates(templates=[template])


def test_caption_file_wins_over_templates(tmp_path):
    root = folder(tmp_path / "a", 2)
    (root / "01.txt").write_text("  my dog on the sofa\n")
    dataset = PersonalizedBase(root, size=8)
    assert [dataset[i]["caption"] for i in range(3)] == [
        "photo of a sks dog",
        "my dog on the sofa",
        "photo of a sks dog",
    ]
    assert dataset.prompts == ["photo of a sks dog", "my dog on the sofa"]
    assert PersonalizedBase(root, size=8, captions=False).prompts == ["photo of a sks dog"]


@pytest.mark.parametrize(
    "content", [b"", b" \n", b"\xff\xfe\xfa", b"a {identifier} dog", b"a sks {class_word}"]
)
def test_bad_caption_file(tmp_path, content):
    root = folder(tmp_path / "a", 1)
    (root / "00.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"00\.txt"):
        PersonalizedBase(root, size=8)


def test_a_class_word_of_spaces(one):
    with pytest.raises(UserError, match="no class word"):
        PersonalizedBase(one, size=8, placeholder_token="  ")


def test_templates_read_backwards():
    assert class_word_of("photo of a cat") == "cat"
    assert class_word_of("photo of a big cat on a mat") == "big cat on a mat"
    assert class_word_of("a drawing of a cat") is None
    assert class_word_of("one cat.", ["a {class_word}", "one {}."]) == "cat"
    assert class_word_of("one cat!", ["one {}."]) is None
    assert class_word_of("nothing", ["nothing"]) is None


@pytest.mark.parametrize(
    "name", ["00.txt", "00.TXT", "00.Txt", "00.caption", "00.CAPTION", "00.png.txt"]
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_caption_files_by_ending_and_encoding(tmp_path, caplog, name, encoding):
    root = folder(tmp_path / "a", 2)
    (root / name).write_text(" ein Hündchen\r\n", encoding=encoding)
    assert PersonalizedBase(root, size=8).prompts == ["ein Hündchen", "photo of a sks dog"]
    assert not caplog.records


def test_two_captions_for_one_photo(tmp_path):
    root = folder(tmp_path / "a", 1)
    for name in ("00.txt", "00.caption"):
        (root / name).write_text("my dog")
    assert PersonalizedBase(root, size=8).prompts == ["my dog"]
    (root / "00.caption").write_text("my cat")
    with pytest.raises(
        UserError, match=r"00\.png: two captions that differ, 00\.caption and 00\.txt"
    ):
        PersonalizedBase(root, size=8)


@pytest.mark.parametrize("content", [b"my d\xf6g", "my dog".encode("utf-16-le"), b"\xff\xfe\xfa"])
def test_captions_in_other_encodings_are_refused(tmp_path, content):
    root = folder(tmp_path / "a", 1)
    (root / "00.caption").write_bytes(content)
    with pytest.raises(
        UserError, match=r"00\.caption: cannot read this caption .*; save it as UTF-8 text"
    ):
        PersonalizedBase(root, size=8)


def test_captions_of_no_photo_are_said(tmp_path, caplog):
    root = folder(tmp_path / "a", 1)
    (root / "00.txt").write_text("my dog")
    for name in ("0.txt", "IMG_00.caption", "metadata.jsonl", ".hidden.txt"):
        (root / name).write_text("my dog")
    PersonalizedBase(root, size=8)
    listed, unused = [record.getMessage() for record in caplog.records]
    assert listed.startswith(f"{root / 'metadata.jsonl'}: is not read")
    assert unused.startswith(f"{root / '0.txt'} and 1 more: no image of this name")
    caplog.clear()
    PersonalizedBase(root, size=8, captions=False)
    assert not caplog.records


def test_an_empty_caption_is_for_class_images_alone(tmp_path):
    images = sorted(folder(tmp_path / "a", 1).iterdir())
    images[0].with_suffix(".txt").touch()
    assert read_captions(images, may_be_empty=True) == {images[0]: ""}
    with pytest.raises(UserError, match=r"00\.txt: this caption is empty"):
        read_captions(images)


def test_only_the_first_photos_count_where_that_is_asked(tmp_path, caplog):
    root = folder(tmp_path / "photos", 4)
    (root / "03.txt").write_text("a caption of a photo that does not count")
    dataset = PersonalizedBase(root, size=8, num_images=2, repeats=3)
    assert [path.name for path in dataset.paths] == ["00.png", "01.png"]
    assert len(dataset) == 6 and dataset.n_images == 2
    assert dataset.prompts == ["photo of a sks dog"]
    assert not caplog.text, "the photo of the caption is there"
    for count in (0, 5):
        with pytest.raises(ParameterError, match=rf"num_images: expected 1 to 4.*got {count}"):
            PersonalizedBase(root, size=8, num_images=count)
