"""The tiny world: scenes, sprites, captions and splits, with sprites drawn here; nothing is
fetched.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.errors import UserError
from ldm.rng import generator
from ldm.tiny import world
from ldm.tiny.sprites import held_out_of
from ldm.tiny.world import World, design, read_sprite_table, recoloured
from ldm.util import instantiate_from_config
from scripts.tiny import fetch_sprites
from tests.tiny.reading import read_words


def picture(dataset, *keys):
    return dataset.example(0, generator(*keys))


# examples


def test_an_example_is_a_function_of_its_generator_alone(sprites):
    dataset, again = World(sprites, labels=True), World(sprites, labels=True)
    first = picture(dataset, "a", 1)
    for i in range(5):
        picture(again, "b", i)  # another history
    second = again.example(77, generator("a", 1))
    assert first["image"].shape == (64, 64, 3) and first["image"].dtype == np.float32
    assert first["image"].min() >= -1 and first["image"].max() <= 1
    np.testing.assert_array_equal(first["image"], second["image"])
    assert {k: v for k, v in first.items() if k != "image"} == {
        k: v for k, v in second.items() if k != "image"
    }
    assert (first["image"] != picture(dataset, "a", 2)["image"]).any()
    np.testing.assert_array_equal(dataset[3]["image"], again[3]["image"])
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_labels_say_what_the_description_says(toys):
    dataset = World(toys, size=16, labels=True)
    names = ("class_word", "scene", "colour", "material", "accessory", "view", "style")
    for i in range(60):
        example, seen = picture(dataset, "labels", i), dataset.describe(generator("labels", i))
        assert example["caption"] == seen.caption and seen.sprite.parent.name == seen.class_word
        assert [example[name] for name in names] == [getattr(seen, name) or "" for name in names]


def test_every_kind_of_change_comes_up_and_its_words_are_in_the_caption(toys):
    """A colour and a scene may be left out of a caption; whatever else is pictured is said."""
    dataset = World(toys, size=16)
    said = dict.fromkeys(("scene", "colour", "material", "accessory", "view", "style"), 0)
    for i in range(600):
        seen = dataset.describe(generator("caption", i))
        found = read_words(seen.caption)
        assert found.class_word == seen.class_word
        for name in said:
            shown, told = getattr(seen, name) or "", getattr(found, name)
            assert told == shown or (told == "" and name in ("scene", "colour")), (name, seen)
            said[name] += bool(told)
    assert said["scene"] > 300 and min(said.values()) > 40


def test_a_plain_world_has_classes_scenes_and_colours_alone(toys):
    dataset = World(toys, size=16, plain=True)
    for i in range(60):
        seen = dataset.describe(generator("plain", i))
        assert (seen.material, seen.accessory, seen.view, seen.style) == (None,) * 4


def test_a_world_shows_the_words_that_are_asked_for_equally_often_and_nothing_else(toys):
    words = ["wearing sunglasses", "facing left", "striped", "pixel art"]
    dataset = World(toys, size=16, showing=words)
    counts = dict.fromkeys(words, 0)
    for i in range(200):
        seen = dataset.describe(generator("showing", i))
        kinds = (seen.material, seen.accessory, seen.view, seen.style)
        (shown,) = [word for word in kinds if word]
        counts[shown] += 1
    assert min(counts.values()) > 30, counts  # 50 are expected


def test_a_world_refuses_words_that_it_cannot_show(toys):
    with pytest.raises(UserError, match=r"'facing lefts'.*facing left"):
        World(toys, showing=["facing lefts"])
    with pytest.raises(UserError, match="plain"):
        World(toys, showing=["striped"], plain=True)
    vases = World(toys, classes=["vase"], showing=["wearing sunglasses"])
    with pytest.raises(UserError, match=r"of vase were tried, and none shows 'wearing sunglasses'"):
        vases.describe(generator("showing", 0))


def test_labels_are_left_out_unless_wanted(sprites):
    assert set(World(sprites)[0]) == {"image", "caption"}


def test_batches_collate(sprites):
    loader = torch.utils.data.DataLoader(
        World(sprites, size=32, length=4, labels=True), batch_size=4
    )
    batch = next(iter(loader))
    assert (
        batch["image"].shape == (4, 32, 32, 3)
        and len(batch["caption"]) == len(batch["colour"]) == 4
    )


def test_the_sprite_is_large_and_a_colour_word_means_the_colour(sprites):
    dataset = World(sprites, classes=["dog"])
    rng = np.random.default_rng(0)
    for colour, channel in (("red", 0), ("green", 1), ("blue", 2)):
        seen = world.Description(
            "dog", dataset.sprites["dog"][0], "on a white background", colour, ""
        )
        middle = dataset._draw(seen, rng)[24:48, 24:40].mean((0, 1))
        assert (
            middle.argmax() == channel and middle[channel] > np.delete(middle, channel).max() + 0.15
        )


def test_recolouring_keeps_the_outline_and_an_empty_sprite():
    pixels = np.random.default_rng(0).integers(256, size=(8, 8, 4), dtype=np.uint8)
    np.testing.assert_array_equal(recoloured(pixels, "red")[..., 3], pixels[..., 3])
    empty = np.zeros((8, 8, 4), np.uint8)
    np.testing.assert_array_equal(recoloured(empty, "red"), empty)


# splits and classes


def test_splits_share_no_design(sprites):
    train, test = (World(sprites, split=split, held_out=0.3) for split in ("train", "test"))
    designs = [
        {design(path) for paths in d.sprites.values() for path in paths} for d in (train, test)
    ]
    assert designs[0].isdisjoint(designs[1]) and all(designs)
    every = {design(path) for paths in World(sprites).sprites.values() for path in paths}
    assert designs[0] | designs[1] == every
    assert train.classes == ["dog", "glasses", "owl"]
    assert test.classes == [
        "dog",
        "glasses",
    ]  # of the owl there is one design, and training needs it


def test_renderings_of_a_drawing_are_one_design():
    assert (
        design(Path("fluent_3d-dog-face.png"))
        == design(Path("fluent-dog-face.png"))
        == "fluent-dog-face"
    )
    assert design(Path("noto-dog.png")) != design(Path("twemoji-dog.png"))
    assert design(Path("toy-dog03@back.png")) == design(Path("toy-dog03@side.png")) == "toy-dog03"


def test_a_new_design_moves_no_other_between_the_splits(sprites):
    paths = sorted((sprites / "dog").glob("*.png"))
    before = held_out_of(paths, 0.3)
    for number in range(20):
        new = Path(f"toy-dog{number:02}@front.png")
        after = held_out_of([*paths, new], 0.3)
        assert after - {new} == before or (len(before) == 1 and after == {new})


def test_classes_are_chosen(sprites):
    assert World(sprites).classes == ["dog", "glasses", "owl"]
    assert World(sprites, classes="narrow").classes == ["dog", "owl"]
    config = {
        "target": "ldm.tiny.world.World",
        "params": {"sprites": str(sprites), "classes": ["owl"]},
    }
    assert instantiate_from_config(config).classes == ["owl"]


def test_classes_come_up_by_their_designs_and_weights(sprites):
    """Dogs and glasses have five times the owls' sprites."""

    def share_of_owls(**params):
        dataset = World(sprites, plain=True, **params)
        words = [dataset.describe(generator("share", n)).class_word for n in range(300)]
        return words.count("owl") / len(words)

    assert share_of_owls() == pytest.approx(1 / 3, abs=0.08)
    assert share_of_owls(balance=1.0) == pytest.approx(1 / 11, abs=0.05)
    assert share_of_owls(balance=1.0, weights={"owl": 10.0}) == pytest.approx(1 / 2, abs=0.08)
    assert share_of_owls(weights={"owl": 6.0}) == pytest.approx(3 / 4, abs=0.08)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"weights": {"dgo": 2.0}}, "weights: no class 'dgo'.*did you mean 'dog'"),
        ({"weights": {"dog": 0}}, "weights: expected a positive factor for 'dog', got 0"),
        ({"classes": ["dgo"]}, "'dgo'.*did you mean 'dog'"),
        ({"classes": "narow"}, "'narow'.*did you mean 'narrow'"),
        ({"classes": []}, "classes: the list is empty"),
        ({"split": "val"}, "train or test, got 'val'"),
        ({"split": "test"}, "held_out"),
        ({"size": 0}, "size: expected a positive number"),
        ({"classes": ["owl"], "split": "test", "held_out": 0.5}, "no sprite is left"),
    ],
)
def test_wrong_parameters_are_named(sprites, params, message):
    with pytest.raises(UserError, match=message):
        World(sprites, **params)


def test_missing_sprites_name_the_script(tmp_path):
    with pytest.raises(
        UserError, match=r"no sprites; fetch them with: python scripts/tiny/fetch_sprites\.py"
    ):
        World(tmp_path / "nowhere")


# fetching


def test_the_sprite_table_has_the_issues_classes():
    table = read_sprite_table()
    papers = {
        "dog",
        "cat",
        "backpack",
        "teapot",
        "vase",
        "clock",
        "candle",
        "boot",
        "sneaker",
        "glasses",
        "bowl",
        "can",
    }
    assert papers | {"toy", "stuffed animal", "penguin", "robot", "car"} <= set(table)
    assert all(
        set(entry) <= {"icons", "without", "narrow", "mirror", "sides", "anchors"}
        for entry in table.values()
    )
    assert 12 <= sum(entry.get("narrow", False) for entry in table.values()) <= 16


def test_fetching_without_npm_ends_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="npm: not found"):
        fetch_sprites.main(["--outdir", str(tmp_path / "out")])


def test_icons_become_trimmed_sprites(tmp_path, monkeypatch):
    pytest.importorskip("resvg_py")
    package = tmp_path / "packages" / "iconify-json-noto" / "package"
    package.mkdir(parents=True)
    icon = {"body": '<rect x="4" y="6" width="8" height="4" fill="#f00"/>'}
    package.joinpath("icons.json").write_text(
        json.dumps({"icons": {"dog": icon, "poodle": icon}, "height": 16})
    )
    package.joinpath("package.json").write_text(
        json.dumps({"version": "1.2", "license": "Apache-2.0"})
    )
    info = {"author": {"name": "Google", "url": "u"}, "license": {"title": "Apache 2.0"}}
    package.joinpath("info.json").write_text(json.dumps(info))
    monkeypatch.setattr(fetch_sprites, "FAMILIES", {"noto": "@iconify-json/noto"})
    table = {"dog": {"icons": ["dog", "poodle"], "without": ["*-poodle"]}}
    monkeypatch.setattr(fetch_sprites, "read_sprite_table", lambda: table)
    credits = tmp_path / "CREDITS.md"
    outdir = tmp_path / "out"
    (outdir / "dog").mkdir(parents=True)
    for name in ("noto-gone.png", "toy-dog00@front.png"):
        (outdir / "dog" / name).write_bytes(b"")
    fetch_sprites.main(
        [
            "--outdir",
            str(outdir),
            "--packages",
            str(tmp_path / "packages"),
            "--credits",
            str(credits),
            "--size",
            "64",
        ]
    )
    assert sorted(path.name for path in outdir.glob("*/*")) == [
        "noto-dog.png",
        "toy-dog00@front.png",
    ]
    with Image.open(outdir / "dog" / "noto-dog.png") as sprite:
        assert sprite.mode == "RGBA" and sprite.size == (64, 32)
        assert sprite.getpixel((32, 16)) == (255, 0, 0, 255)
    assert "| `@iconify-json/noto` | 1.2 | Apache 2.0 | [Google](u) |" in credits.read_text()
