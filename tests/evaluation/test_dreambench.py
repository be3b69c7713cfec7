"""The published dataset's file of prompts and classes, parsed as it is."""

import pytest

from ldm.errors import UserError
from ldm.evaluation.dreambench import read_dataset
from tests.support.dreambench import make_dataset


def test_subjects_have_the_classes_and_prompts_of_the_file(tmp_path):
    make_dataset(tmp_path / "dataset", {"bear_plushie": "stuffed animal", "dog2": "dog"})
    bear, dog = read_dataset(tmp_path)  # the repository's folder
    assert (bear.class_word, dog.class_word) == ("stuffed animal", "dog")
    assert bear.prompts("sks") == ["a sks stuffed animal in the snow", "a red sks stuffed animal"]
    # Dogs and cats have the prompts of live subjects.
    assert dog.prompts("sks") == ["a sks dog in the snow", "a sks dog wearing a santa hat"]
    (only,) = read_dataset(tmp_path / "dataset", ["dog2"])  # or its folder of subjects
    assert only.photos == tmp_path / "dataset/dog2"


def test_what_is_not_there_is_named(tmp_path):
    folder = make_dataset(tmp_path, {"dog": "dog", "vase": "vase"})
    with pytest.raises(UserError, match=r"no subject 'dogs' \(did you mean 'dog'\?\)"):
        read_dataset(folder, ["dogs"])
    for photo in (folder / "vase").iterdir():
        photo.unlink()
    with pytest.raises(UserError, match="vase: no photos of this subject"):
        read_dataset(folder)
    text = (folder / "prompts_and_classes.txt").read_text()
    (folder / "prompts_and_classes.txt").write_text(text.replace("Live Subject", "Animal"))
    with pytest.raises(UserError, match="no prompts under 'Live Subject Prompts'"):
        read_dataset(folder)
    with pytest.raises(UserError, match=r"no prompts_and_classes\.txt in it"):
        read_dataset(tmp_path / "vase")
