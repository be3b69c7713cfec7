"""Scores of groups of pictures, their intervals, and the command over anyone's folders."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.errors import UserError
from ldm.evaluation.encoders import Encoders
from ldm.evaluation.folders import places, prompts_of, read_prompts
from ldm.evaluation.intervals import estimate
from ldm.evaluation.protocols import KEPT, find_protocol
from ldm.evaluation.scores import Group, Scored, score_group, score_real
from ldm.evaluation.tables import difference_table, differences
from ldm.sampling.metadata import picture_texts
from ldm.sampling.pictures import save_png
from ldm.sampling.text_to_image import Recipe
from scripts import evaluate

CUSTOM = find_protocol("custom")


def gray(value, size=8):
    return Image.new("RGB", (size, size), (value,) * 3)


def direction(degrees):
    radians = torch.tensor(degrees, dtype=torch.float32) * torch.pi / 180
    return torch.stack([radians.cos(), radians.sin()], -1)


def of_gray(pictures):
    """A picture's gray is the angle of its feature."""
    return direction([picture.getpixel((0, 0))[0] for picture in pictures])


@pytest.fixture
def encoders():
    """Encoders whose every score can be worked out on paper; a text's length is its angle."""

    def said(texts):
        return direction([len(text) for text in texts])

    def distance(first, second):
        return (of_gray(first) - of_gray(second)).norm(dim=-1)

    return Encoders(of_gray, of_gray, said, distance, {"DINO": "abc", "CLIP": "def"})


def cos(*degrees):
    return float(np.mean(np.cos(np.radians(degrees))))


def test_each_score_is_what_it_says(encoders):
    prompts = ["a sks dog", "a sks dog", "a wet sks dog", "a wet sks dog"]
    pictures = [gray(value) for value in (10, 20, 30, 50)]
    group = Group("dog", pictures, prompts, [gray(0), gray(40)], [gray(60)])
    found = score_group(group, encoders, CUSTOM)
    likeness = cos(10, 20, 30, 50, 30, 20, 10, 10)
    assert found["DINO"] == pytest.approx(likeness, abs=1e-6)
    assert found["CLIP-I"] == pytest.approx(likeness, abs=1e-6)
    assert found["PRES"] == pytest.approx(cos(60, 20), abs=1e-6)
    # "a dog" has 5 letters and "a wet dog" 9.
    assert found["CLIP-T"] == pytest.approx(cos(10 - 5, 20 - 5, 30 - 9, 50 - 9), abs=1e-6)
    chord = [2 * np.sin(np.radians(degrees / 2)) for degrees in (10, 20)]
    assert found["DIV"] == pytest.approx(np.mean(chord), abs=1e-6)
    kept = score_group(group, encoders, CUSTOM.having(identifier=KEPT))
    assert kept["CLIP-T"] == pytest.approx(cos(10 - 9, 20 - 9, 30 - 13, 50 - 13), abs=1e-6)


def test_the_row_of_real_images_leaves_out_each_with_itself(encoders):
    found = score_real([gray(0), gray(30), gray(60)], encoders)
    assert found["DINO"] == pytest.approx(cos(30, 60, 30), abs=1e-6)
    assert score_real([gray(0)], encoders) == {}


def test_a_protocol_refuses_what_it_is_not(encoders):
    pictures, prompts = [gray(1), gray(2)], ["a dog", "a dog"]
    group = Group("dog", pictures, prompts, [gray(0), gray(40)])
    with pytest.raises(UserError, match=r"'paper' asks for 4 pictures of each prompt.* are? 2"):
        score_group(group, encoders, find_protocol("paper"))
    with pytest.raises(UserError, match="one reference picture a subject, and there are 2"):
        score_group(group, encoders, find_protocol("dreambench++"))
    with pytest.raises(UserError, match=r"unknown .did you mean 'kosmos-g'"):
        find_protocol("kosmos")
    changed = find_protocol("paper").having(clip="ViT-L-14/openai")
    assert changed.name == "custom" and "paper with another clip" in changed.source


def test_an_interval_is_of_subjects_and_seeds():
    wide = estimate({"dog": [0.1, 0.1], "cat": [0.9, 0.9]})
    assert (wide.mean, wide.low, wide.high) == pytest.approx((0.5, 0.1, 0.9))
    seeds = estimate({"dog": [0.4, 0.6]})
    assert (seeds.low, seeds.high) == pytest.approx((0.4, 0.6))
    assert estimate({"dog": [0.5]}).low is None and str(estimate({"dog": [0.5]})) == "0.500"
    # A mean of subjects, however many seeds each has; in any order.
    assert estimate({"dog": [0.0], "cat": [1.0, 1.0, 1.0]}).mean == 0.5
    assert estimate({"a": [1, 3], "b": [2]}) == estimate({"b": [2], "a": [3, 1]})


def test_an_interval_covers_the_mean_about_as_often_as_it_says():
    random, covered = np.random.default_rng(1), 0
    for _ in range(60):
        subjects = random.normal(0, 1, 30)
        values = {str(n): list(s + random.normal(0, 0.5, 2)) for n, s in enumerate(subjects)}
        found = estimate(values)
        covered += found.low < 0 < found.high
    assert 52 <= covered <= 60


def test_differences_are_of_pairs():
    """Seeds that move both rows alike do not hide what lies between them."""
    luck = {"a": (0.1, 0.5), "b": (0.2, 0.9)}

    def scored(more):
        rows = [
            {"subject": subject, "seed": str(seed), "DINO": value + more}
            for subject, values in luck.items()
            for seed, value in enumerate(values)
        ]
        return Scored("custom", {}, rows)

    found = scored(0.02).against(scored(0.0))["DINO"]
    assert (found.mean, found.low, found.high) == pytest.approx((0.02, 0.02, 0.02))
    assert found.count == 4
    # What no training has made of a subject stands beside each of its seeds, on either side.
    once = Scored("custom", {}, [{"subject": name, "seed": "", "DINO": 0.1} for name in luck])
    found, turned = scored(0.0).against(once)["DINO"], once.against(scored(0.0))["DINO"]
    assert found.count == turned.count == 4
    assert found.mean == -turned.mean == pytest.approx(np.mean([0.0, 0.4, 0.1, 0.8]))
    # Seeds that the other has not, and scores that one of them has not, are no pairs: the one
    # training of a subject that did not fail is of its own seed.
    other = [{"subject": "a", "seed": "0", "DINO": 0.0}]
    found = scored(0.0).against(Scored("custom", {}, other))["DINO"]
    assert (found.mean, found.count) == (pytest.approx(0.1), 1)
    other = [{"subject": "a", "seed": seed, "DIV": 0.1} for seed in ("0", "7")]
    assert scored(0.0).against(Scored("custom", {}, other)) == {}
    rows = {"real images": scored(1.0), "base": scored(0.0), "dreambooth": scored(0.02)}
    table = difference_table(differences(rows, "base"), "base")
    assert "real images" not in table and "| dreambooth | +0.020 [+0.020, +0.020] |" in table


def make(folder, values, prompts=None):
    folder.mkdir(parents=True)
    for number, value in enumerate(values):
        texts = picture_texts(prompts[number], Recipe()) if prompts else None
        save_png(gray(value, 64), folder / f"{number:05}.png", texts)


def test_folders_of_subjects_and_seeds(tmp_path):
    for name in ("dog", "cat"):
        make(tmp_path / "real" / name, [1, 2])
    for seed in ("seed1", "seed2"):
        make(tmp_path / "images/dog" / seed, [3, 4], ["a dog", "a cat"])
    (dog, other) = places(tmp_path / "images", tmp_path / "real")
    assert (dog.subject, dog.seed, len(dog.images), len(dog.real)) == ("dog", "seed1", 2, 2)
    assert prompts_of(dog.images, None) == ["a dog", "a cat"]
    assert other.seed == "seed2"
    with pytest.raises(UserError, match="made of 'a cat', which --prompts does not have"):
        prompts_of(dog.images, ["a dog"])
    make(tmp_path / "images/cow", [3])
    with pytest.raises(UserError, match="no photos of this subject"):
        places(tmp_path / "images", tmp_path / "real")


def test_pictures_without_words_are_named_by_their_order(tmp_path):
    make(tmp_path / "images", [1, 2, 3, 4])
    pictures = sorted((tmp_path / "images").iterdir())
    assert prompts_of(pictures, None) is None
    assert prompts_of(pictures, ["a", "b"], "grouped") == ["a", "a", "b", "b"]
    assert prompts_of(pictures, ["a", "b"], "in_turn") == ["a", "b", "a", "b"]
    with pytest.raises(UserError, match="say --order grouped"):
        prompts_of(pictures, ["a", "b"])
    with pytest.raises(UserError, match="4 pictures and 3 prompts"):
        prompts_of(pictures, ["a", "b", "c"])
    (tmp_path / "windows.txt").write_bytes("a\r\nb\r\n".encode("utf-16"))
    assert read_prompts(tmp_path / "windows.txt", None, "sks") == ["a", "b"]
    pictures[0].with_suffix(".txt").write_text("a dog\n")
    with pytest.raises(UserError, match="says no prompt, and others do"):
        prompts_of(pictures, ["a", "b"], "grouped")


def test_the_command_scores_folders_with_the_miniatures_encoders(tmp_path, capsys):
    make(tmp_path / "real", [10, 200])
    make(tmp_path / "mine", [20, 220], ["a sks dog", "a sks dog"])
    command = ["--images", tmp_path / "mine", "--real", tmp_path / "real"]
    output = tmp_path / "scores.json"
    command += ["--protocol", "miniature", "--output", output]
    assert evaluate.main(list(map(str, command))) == 0
    table = capsys.readouterr().out
    assert "| real images |" in table and "| mine |" in table
    assert "Protocol: miniature (compares with nothing else)" in table
    found = json.loads(output.read_text())
    assert found["protocol"] == "miniature" and found["encoders"]["CLIP"].startswith("miniature ")
    (row,) = found["images"]
    assert 0 < row["DINO"] <= 1 and row["DIV"] > 0 and -1 <= row["CLIP-T"] <= 1


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--protocol", "papers"], "did you mean 'paper'"),
        (["--scores", "PRES"], "needs --class_images"),
        (["--scores", "CLIP-T"], "give --prompts"),
        (["--dino", "nowhere.pth"], "nowhere.pth: no such file"),
        (
            ["--dino", "nowhere.pth"],
            "paper asks for 4 pictures of each prompt. This is not checked",
        ),
        (["--class_images", "nowhere"], "nowhere: no such folder"),
        (["--output", "{here}"], "is a folder; name a file in it"),
        (["--output", "{here}/real/00000.png/x.json"], "choose another --output"),
        (["--real", "{here}/mine"], "mine/00000.png: is a photo of --real, too"),
        (["--images", "{here}/cut"], "cut/a.png: cannot read this image"),
        (["--prompts", "{here}/latin.txt"], "latin.txt: cannot read this file of prompts"),
        (["--prompts", "{here}/X.JSON"], "X.JSON: no JSON"),
    ],
)
def test_what_the_command_cannot_do_is_one_line(tmp_path, caplog, flags, message):
    make(tmp_path / "real", [10])
    make(tmp_path / "mine", [20])
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/a.png").write_bytes((tmp_path / "mine/00000.png").read_bytes()[:60])
    (tmp_path / "latin.txt").write_bytes("süß".encode("latin1"))
    (tmp_path / "X.JSON").write_text("{")
    command = ["--images", str(tmp_path / "mine"), "--real", str(tmp_path / "real")]
    command += [flag.format(here=tmp_path) for flag in flags]
    assert evaluate.main(command) == 1
    assert message in caplog.text
