"""The class word that photos ask for, by a CLIP: the command, and a training's start."""

import logging
import re

import open_clip
import pytest
import torch

import main
from ldm.checkpoints.reading import read_checkpoint
from ldm.config import load_config, to_plain
from ldm.errors import UserError
from ldm.evaluation.class_nouns import NOUNS, ImageText, all_nouns, suggest
from ldm.tiny.clip import CLIP
from ldm.tiny.encoders import read_clip
from ldm.tiny.miniature import CLIP_CONFIG
from scripts import convert, suggest_class
from tests.support.runs import Workspace, same
from tests.training.test_exactness import CONCEPTS


def shown(photos):
    """Photos are numbers here: the place of the noun that they show."""
    return torch.nn.functional.one_hot(torch.tensor(photos), 200).float()


def said(texts):
    nouns = [text.removeprefix("a photo of a ") for text in texts]
    known = all_nouns()
    places = [known.index(noun) if noun in known else 199 for noun in nouns]
    return torch.nn.functional.one_hot(torch.tensor(places), 200).float()


def of(noun, given=None):
    return suggest([all_nouns().index(noun)] * 3, ImageText(shown, said), given)


def test_the_noun_of_the_photos_comes_first():
    found = of("teapot")
    assert found.best == "teapot" and found.shares["teapot"] > 0.99
    assert found.line().endswith("--class_word 'teapot'")
    assert sum(found.shares.values()) == pytest.approx(1)


def test_a_noun_that_is_given_twice_counts_once():
    twice = suggest([0], ImageText(shown, said), nouns=["dog", "teapot", "dog"])
    assert sum(twice.shares.values()) == pytest.approx(1) and len(twice.shares) == 2


@pytest.mark.parametrize(
    ("noun", "given", "is_doubtful"),
    [
        ("dog", "dog", False),
        ("dog", "cat", True),
        ("dog", "animal", False),
        ("animal", "dog", False),
        ("dog", "corgi dog", False),
        ("dog", "xylophone", True),
        ("dog", "", False),
    ],
)
def test_a_given_word_is_doubted_when_another_is_far_likelier(noun, given, is_doubtful):
    found = of(noun, given)
    assert found.is_doubtful is is_doubtful
    assert ("looks wrong" in found.line()) is is_doubtful


def test_no_noun_stands_twice():
    assert len(all_nouns()) == len(NOUNS) + sum(map(len, NOUNS.values()))


# With a CLIP


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A checkpoint of a small CLIP, as its training writes it."""
    config = to_plain(load_config([CLIP_CONFIG]))
    params = config["model"]["params"]
    params["vision_cfg"]["width"], params["text_cfg"]["width"] = 8, 16
    params["text_cfg"]["layers"], params["embed_dim"] = 1, 16
    path = tmp_path_factory.mktemp("clip") / "clip.ckpt"
    torch.manual_seed(0)
    state = CLIP(**params).state_dict()
    torch.save({"state_dict": state, "config": config}, path)
    return path


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("class_word"))


def test_an_empty_noun_is_one_line(clip, workspace, caplog):
    flags = [str(workspace.photos), "--clip", str(clip), "--nouns", "dog", ""]
    assert suggest_class.main(flags) == 1
    assert "--nouns: one of them is empty" in caplog.text


def test_the_command_prints_the_nouns(clip, workspace, capsys):
    flags = [str(workspace.photos), "--clip", str(clip), "--nouns", "dog", "owl", "--device", "cpu"]
    assert suggest_class.main(flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3, "the line, and the two nouns"
    assert {line.split()[-1] for line in lines[1:]} == {"dog", "owl"}


def test_the_miniatures_clip_is_asked_about_what_it_knows(clip):
    towers = read_clip(clip)
    assert "teapot" in towers.nouns and "horse" not in towers.nouns
    assert towers.scale == pytest.approx(1 / 0.07, rel=1e-4), (
        "as it starts, not the 100 of OpenAI's"
    )


def test_a_file_without_a_text_tower_and_an_unknown_name_are_refused(clip, tmp_path):
    tower = tmp_path / "tower.safetensors"
    assert (
        convert.main(["--ckpt", str(clip), "--output", str(tower), "--only", "clip.visual."]) == 0
    )
    with pytest.raises(UserError, match="image tower of the miniature's CLIP alone"):
        read_clip(tower)
    with pytest.raises(UserError, match="open_clip knows no such architecture"):
        read_clip("no-such-file.bin")


def test_a_clip_without_the_name_of_its_weights_is_refused(monkeypatch):
    monkeypatch.setattr(open_clip, "create_model", None)  # it would draw them at random
    with pytest.raises(UserError, match="CLIP 'ViT-B-32': names no weights"):
        read_clip("ViT-B-32")


def test_a_training_says_whether_the_class_word_fits_and_does_not_change(clip, workspace, caplog):
    caplog.set_level(logging.INFO)
    plain = workspace.train("plain", "--max_steps", "1")
    assert "class word" not in caplog.text
    asked = workspace.train("asked", "--max_steps", "1", f"run.class_clip={clip}")
    (line,) = [line for line in caplog.text.splitlines() if line.startswith("  class word")]
    assert "'dog'" in line and "the photos look like" in line
    weights = [
        read_checkpoint(run / "checkpoints/last.ckpt")["state_dict"] for run in (plain, asked)
    ]
    assert same(*weights)


def test_each_of_several_class_words_is_compared(clip, workspace, caplog):
    caplog.set_level(logging.INFO)
    workspace.train("two", "--max_steps", "1", f"run.class_clip={clip}", CONCEPTS[0])
    (line,) = [line for line in caplog.text.splitlines() if line.startswith("  class word")]
    assert "'dog'" in line and "'cat'" in line


def test_what_is_no_name_of_a_clip_is_refused(workspace, caplog):
    assert main.main(workspace.arguments("number", "run.class_clip=5")) == 1
    assert "run.class_clip: expected a CLIP's name or file, got 5" in caplog.text


def test_a_training_goes_on_without_the_clip(workspace, caplog):
    caplog.set_level(logging.INFO)
    workspace.train("without", "--max_steps", "1", "run.class_clip=no-such-file.bin")
    assert re.search("class word +'dog', not compared with the photos: ", caplog.text)
