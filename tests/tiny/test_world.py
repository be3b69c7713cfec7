"""The tiny world: scenes, sprites, captions and splits, with sprites drawn here; nothing is fetched."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from ldm.errors import UserError
from ldm.rng import generator
from ldm.tiny import world
from ldm.tiny.scenes import PLAIN, SCENES
from ldm.tiny.world import COLOURS, World, design, read_sprite_table, recoloured, with_article
from ldm.util import instantiate_from_config
from scripts.tiny import fetch_sprites

FAMILIES = ("noto", "noto_v1", "twemoji", "fluent", "fluent_3d")
PAPER_SCENES = [
    "in the jungle",
    "in the snow",
    "on the beach",
    "on a cobblestone street",
    "on top of pink fabric",
    "on top of a wooden floor",
    "with a city in the background",
    "with a mountain in the background",
    "with a blue house in the background",
    "on top of a purple rug in a forest",
    "with a wheat field in the background",
    "with a tree and autumn leaves in the background",
    "with the Eiffel Tower in the background",
    "floating on top of water",
    "on top of green grass with sunflowers around it",
    "on top of a dirt road",
    "on top of a white rug",
]


@pytest.fixture(scope="module")
def sprites(tmp_path_factory):
    """Blobs of three classes: 5 families of 2 icons each, and one class of a single design."""
    root = tmp_path_factory.mktemp("sprites")
    rng = np.random.default_rng(0)
    for class_word, icons in (("dog", ("dog", "poodle")), ("glasses", ("glasses", "goggles")), ("owl", ("owl",))):
        (root / class_word).mkdir()
        for icon in icons:
            for family in FAMILIES if class_word != "owl" else FAMILIES[:2]:
                image = Image.new("RGBA", (128, int(rng.integers(60, 129))))
                ImageDraw.Draw(image).ellipse((2, 2, 125, image.height - 3), fill=tuple(rng.integers(256, size=3)))
                image.save(root / class_word / f"{family}-{icon}.png")
    return root


def picture(dataset, *keys):
    return dataset.example(0, generator(*keys))


# scenes


@pytest.mark.parametrize("size", [32, 64])
def test_every_scene_draws_repeatably_and_unlike_the_others(size):
    drawn = {words: draw(np.random.default_rng(3), size) for words, draw in SCENES.items()}
    for words, pixels in drawn.items():
        assert pixels.shape == (size, size, 3) and pixels.dtype == np.uint8
        np.testing.assert_array_equal(pixels, SCENES[words](np.random.default_rng(3), size), err_msg=words)
        assert (pixels != SCENES[words](np.random.default_rng(4), size)).any(), words
    small = {w: np.asarray(Image.fromarray(p).resize((8, 8), Image.Resampling.BOX), float) for w, p in drawn.items()}
    for words, pixels in small.items():
        closest = min((np.abs(pixels - other).mean(), name) for name, other in small.items() if name != words)
        assert closest[0] > 6, f"{words} looks like {closest[1]}"


def test_the_papers_scenes_are_there():
    assert {*PAPER_SCENES, "at night", "on a red background", "on an orange background"} <= set(SCENES)
    assert set(PLAIN) < set(SCENES)


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
    assert {k: v for k, v in first.items() if k != "image"} == {k: v for k, v in second.items() if k != "image"}
    assert (first["image"] != picture(dataset, "a", 2)["image"]).any()
    np.testing.assert_array_equal(dataset[3]["image"], again[3]["image"])
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_captions_agree_with_labels_and_description(sprites):
    dataset, said = World(sprites, size=16, labels=True), {"scene": 0, "colour": 0}
    for i in range(200):
        example, seen = picture(dataset, "caption", i), dataset.describe(generator("caption", i))
        caption = example["caption"]
        assert caption == seen.caption and example["class_word"] == seen.class_word
        assert (example["scene"], example["colour"]) == (seen.scene, seen.colour or "")
        assert seen.sprite.parent.name == seen.class_word
        place = caption.find(seen.scene)
        before, behind = (caption[:place], caption[place:]) if place >= 0 else (caption, "")
        assert behind in ("", seen.scene)
        words = before.split()
        assert words[-1] == seen.class_word
        colours = [word for word in words if word in COLOURS]
        assert colours in ([], [seen.colour])
        if seen.class_word != "glasses":
            noun = " ".join([*colours, seen.class_word])
            assert f"{with_article(noun)}" in before
        said["scene"] += bool(behind)
        said["colour"] += bool(colours)
    assert 100 < said["scene"] < 200 and 25 < said["colour"] < 100


@pytest.mark.parametrize(
    ("noun", "phrase"),
    [
        ("dog", "a dog"),
        ("owl", "an owl"),
        ("unicorn", "a unicorn"),
        ("orange car", "an orange car"),
        ("red glasses", "red glasses"),
    ],
)
def test_articles(noun, phrase):
    assert with_article(noun) == phrase


def test_labels_are_left_out_unless_wanted(sprites):
    assert set(World(sprites)[0]) == {"image", "caption"}


def test_batches_collate(sprites):
    loader = torch.utils.data.DataLoader(World(sprites, size=32, length=4, labels=True), batch_size=4)
    batch = next(iter(loader))
    assert batch["image"].shape == (4, 32, 32, 3) and len(batch["caption"]) == len(batch["colour"]) == 4


def test_the_sprite_is_large_and_a_colour_word_means_the_colour(sprites):
    dataset = World(sprites, classes=["dog"])
    rng = np.random.default_rng(0)
    for colour, channel in (("red", 0), ("green", 1), ("blue", 2)):
        seen = world.Description("dog", dataset.sprites["dog"][0], "on a white background", colour, "")
        middle = dataset._draw(seen, rng)[24:48, 24:40].mean((0, 1))
        assert middle.argmax() == channel and middle[channel] > np.delete(middle, channel).max() + 0.15


def test_recolouring_keeps_the_outline_and_an_empty_sprite():
    pixels = np.random.default_rng(0).integers(256, size=(8, 8, 4), dtype=np.uint8)
    np.testing.assert_array_equal(recoloured(pixels, "red")[..., 3], pixels[..., 3])
    empty = np.zeros((8, 8, 4), np.uint8)
    np.testing.assert_array_equal(recoloured(empty, "red"), empty)


# splits and classes


def test_splits_share_no_design(sprites):
    train, test = (World(sprites, split=split, held_out=0.3) for split in ("train", "test"))
    designs = [{design(path) for paths in d.sprites.values() for path in paths} for d in (train, test)]
    assert designs[0].isdisjoint(designs[1]) and all(designs)
    every = {design(path) for paths in World(sprites).sprites.values() for path in paths}
    assert designs[0] | designs[1] == every
    assert train.classes == ["dog", "glasses", "owl"]
    assert test.classes == ["dog", "glasses"]  # of the owl there is one design, and training needs it


def test_renderings_of_a_drawing_are_one_design():
    assert design(Path("fluent_3d-dog-face.png")) == design(Path("fluent-dog-face.png")) == "fluent-dog-face"
    assert design(Path("noto-dog.png")) != design(Path("twemoji-dog.png"))


def test_classes_are_chosen(sprites):
    assert World(sprites).classes == ["dog", "glasses", "owl"]
    assert World(sprites, classes="narrow").classes == ["dog", "owl"]
    config = {"target": "ldm.tiny.world.World", "params": {"sprites": str(sprites), "classes": ["owl"]}}
    assert instantiate_from_config(config).classes == ["owl"]


def test_classes_come_up_by_their_designs_and_weights(sprites):
    """Dogs and glasses have five times the owls' sprites."""

    def share_of_owls(**params):
        words = [World(sprites, **params).describe(generator("share", n)).class_word for n in range(300)]
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
    with pytest.raises(UserError, match=r"no sprites; fetch them with: python scripts/tiny/fetch_sprites\.py"):
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
    assert all(set(entry) <= {"icons", "without", "narrow", "mirror"} for entry in table.values())
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
    package.joinpath("icons.json").write_text(json.dumps({"icons": {"dog": icon, "poodle": icon}, "height": 16}))
    package.joinpath("package.json").write_text(json.dumps({"version": "1.2", "license": "Apache-2.0"}))
    info = {"author": {"name": "Google", "url": "u"}, "license": {"title": "Apache 2.0"}}
    package.joinpath("info.json").write_text(json.dumps(info))
    monkeypatch.setattr(fetch_sprites, "FAMILIES", {"noto": "@iconify-json/noto"})
    table = {"dog": {"icons": ["dog", "poodle"], "without": ["*-poodle"]}}
    monkeypatch.setattr(fetch_sprites, "read_sprite_table", lambda: table)
    credits = tmp_path / "CREDITS.md"
    outdir = tmp_path / "out"
    fetch_sprites.main(
        ["--outdir", str(outdir), "--packages", str(tmp_path / "packages"), "--credits", str(credits), "--size", "64"]
    )
    assert [path.name for path in outdir.glob("*/*")] == ["noto-dog.png"]
    with Image.open(outdir / "dog" / "noto-dog.png") as sprite:
        assert sprite.mode == "RGBA" and sprite.size == (64, 32)
        assert sprite.getpixel((32, 16)) == (255, 0, 0, 255)
    assert "| `@iconify-json/noto` | 1.2 | Apache 2.0 | [Google](u) |" in credits.read_text()
