"""Several subjects: whose turn it is, what a batch holds, and which lists of them are refused."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

import ldm.training.prepare
from ldm.data.datamodule import DataModuleFromConfig
from ldm.data.turns import Turns
from ldm.errors import UserError
from ldm.training.stages import Stages
from tests.data.test_batches import PERSONALIZED, as_rank, examples, module
from tests.support.photos import folder

CLASSES = {"dog": "sks", "cat": "zwx", "owl": "olis"}


@pytest.fixture
def roots(tmp_path):
    """Photos and class images of each class."""
    for number, name in enumerate(CLASSES):
        folder(tmp_path / name, 2 + number, first=number)
        folder(tmp_path / f"{name}s", 3, first=10 + number)
    return tmp_path


def entry(roots, name, **more):
    own = {"data_root": str(roots / name), "class_word": name, "identifier": CLASSES[name]}
    return own | {"reg_data_root": str(roots / f"{name}s")} | more


def joint(concepts, **params):
    own = {"size": 4, **{key: params.pop(key) for key in ("identifier",) if key in params}}
    train = {"target": PERSONALIZED, "params": own}
    reg = params.pop("reg", {"target": PERSONALIZED, "params": {"size": 4, "reg": True}})
    params = {"batch_size": 1, "num_workers": 0, **params}
    return DataModuleFromConfig(train=train, reg=reg, concepts=concepts, **params)


@pytest.mark.parametrize("weights, turn, first", [
    ([1], None, [0, 0, 0, 0]),
    ([1, 1], None, [0, 1, 0, 1]),
    ([2, 1], None, [0, 1, 0, 0, 1, 0]),
    ([0.5, 0.25, 0.25], None, [0, 1, 2, 0]),
    ([1, 1], 3, [0, 0, 0, 1, 1, 1, 0]),
    ([2, 1], 2, [0, 0, 0, 0, 1, 1, 0]),
    ([1, 0.25], 4, [0, 0, 0, 0, 1, 0]),
])  # fmt: skip
def test_whose_turn_it_is(weights, turn, first):
    turns = Turns(weights, turn)
    found = [turns.at(g) for g in range(60)]
    assert [subject for subject, _ in found[: len(first)]] == first
    # Each subject's own positions go up one by one, so that none of its examples is left out.
    done = Counter()
    for subject, position in found:
        assert position == done[subject]
        done[subject] += 1
    assert [done[n] / 60 for n in range(len(weights))] == pytest.approx(
        [weight / sum(weights) for weight in weights], abs=0.06
    )


def test_one_subject_is_a_list_of_one(roots):
    plain = module(roots / "dog", roots / "dogs", seed=5)
    plain.setup("fit")
    listed = joint([entry(roots, "dog")], seed=5)
    listed.setup("fit")
    assert examples(plain.train_dataloader()) == examples(listed.train_dataloader())
    assert plain.summary() == listed.summary() and "concepts" not in plain.summary()


def test_a_batch_has_each_subjects_words_and_the_images_of_its_class(roots):
    data = joint([entry(roots, "dog"), entry(roots, "cat", weight=2)], batch_size=3)
    data.setup("fit")
    subject, prior = next(iter(data.train_dataloader()))
    named = ["photo of a zwx cat", "photo of a sks dog", "photo of a zwx cat"]
    assert subject["caption"] == named
    assert prior["caption"] == ["photo of a cat", "photo of a dog", "photo of a cat"]
    # Photos hold one value each: 0 and 10 of the dog, 10 to 30 of the cat.
    pixels = (subject["image"][:, 0, 0, 0] + 1) * 127.5
    assert pixels[1].round() in (0, 10) and pixels[0].round() in (10, 20, 30)
    assert len(set(map(int, subject["noise_seed"])) | set(map(int, prior["noise_seed"]))) == 6
    # The first subject has the random numbers that it has alone.
    alone = next(iter(module(roots / "dog", roots / "dogs").train_dataloader()))
    for ours, theirs in zip((subject, prior), alone):
        assert ours["noise_seed"][1] == theirs["noise_seed"][0]
        assert torch.equal(ours["image"][1], theirs["image"][0])


@pytest.mark.parametrize("turn", [None, 4])
def test_two_ranks_have_the_examples_of_one_in_any_batch_size(roots, turn):
    concepts = [entry(roots, "dog"), entry(roots, "cat", weight=0.5), entry(roots, "owl")]

    def of(rank, world, size, done=0):
        data = as_rank(joint(concepts, turn=turn, batch_size=size), rank, world, done)
        data.setup("fit")
        return examples(data.train_dataloader())[:24]

    whole = of(0, 1, 4)
    first, second = of(0, 2, 2), of(1, 2, 2)
    together = [row for n in range(0, 12, 2) for row in (*first[n : n + 2], *second[n : n + 2])]
    assert together == whole[:24]
    assert of(0, 1, 4, done=2)[:8] == whole[8:16]  # as a resumed run goes on


def test_what_a_list_says_together_and_of_each(roots):
    data = joint([entry(roots, "dog", templates="a {identifier}"), entry(roots, "cat")])
    found = data.summary()
    assert found["subject_images"] == 5 and found["class_images"] == 6
    assert found["subject_prompts"] == ["a sks", "photo of a zwx cat"]
    assert [own["subject_images"] for own in found["concepts"]] == [2, 3]
    # Who names no identifier has the one that all share.
    unnamed = {key: value for key, value in entry(roots, "dog").items() if key != "identifier"}
    data = joint([unnamed, entry(roots, "cat")], identifier="shs")
    assert data.summary()["subject_prompts"] == ["photo of a shs dog", "photo of a zwx cat"]
    # Captions beside the photos win, for each subject by itself.
    (roots / "cat" / "00.txt").write_text("my zwx")
    assert (
        "my zwx" in joint([entry(roots, "dog"), entry(roots, "cat")]).summary()["subject_prompts"]
    )


def test_class_images_are_made_for_each_subject_and_once_for_a_shared_folder(roots, monkeypatch):
    made = []

    def make(folder_, prompts, count, **more):
        made.append((folder_.name, prompts, count))
        for number in range(count):
            (folder_ / f"new{number}.png").write_bytes((folder_ / "00.png").read_bytes())

    monkeypatch.setattr(
        ldm.training.prepare, "make_class_images", lambda **more: make(more.pop("folder"), **more)
    )
    shared = entry(roots, "owl", class_word="dog", reg_data_root=str(roots / "dogs"))
    data = joint([entry(roots, "dog"), entry(roots, "cat"), shared], num_class_images=5)
    assert data.summary()["class_images_to_make"] == 4
    assert "reg" not in data.datasets
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")))
    ldm.training.prepare.prepare(SimpleNamespace(), data, trainer, Stages())
    assert made == [("dogs", ["photo of a dog"], 2), ("cats", ["photo of a cat"], 2)]
    assert data.summary()["class_images"] == 15 and "reg" in data.datasets


def test_class_images_that_lack_may_be_counted_before_they_are_made(roots):
    counted = {"target": PERSONALIZED, "params": {"size": 4, "reg": True, "num_images": 5}}
    # Of five, three are there.
    data = joint([entry(roots, "dog")], reg=counted, num_class_images=5)
    assert data.summary()["class_images_to_make"] == 2
    for number in (7, 8):
        (roots / "dogs" / f"{number}.png").write_bytes((roots / "dogs/00.png").read_bytes())
    data.setup("fit")
    assert data.summary()["class_images"] == 5
    with pytest.raises(UserError, match=r"reg.params.num_images: 5 of the 4 that num_class_images"):
        joint([entry(roots, "cat")], reg=counted, num_class_images=4)


def changed(roots, second, **params):
    return joint([entry(roots, "dog"), {**entry(roots, "cat"), **second}], **params)


@pytest.mark.parametrize("second, params, message", [
    ({"identifier": "SKS"}, {}, r"concepts\[1\].identifier: 'SKS' names concepts\[0\] in .*dog, too"),
    ({"data_root": "dog"}, {}, r"concepts\[1\].data_root: .*overlap: give each subject a folder"),
    ({"data_root": "."}, {}, r"concepts\[1\].data_root: .*overlap"),
    ({"data_root": "nowhere"}, {}, "nowhere"),
    ({"reg_data_root": "dogs"}, {}, r"reg_data_root: .*overlap, and are of 'cat' and 'dog'"),
    ({"reg_data_root": "dog"}, {}, "is the folder of both the subject's photos and the class"),
    ({"reg_data_root": None}, {}, r"concepts\[1\]: no folder for its class images"),
    ({"weight": 0}, {}, r"concepts\[1\].weight: expected a positive number, got 0"),
    ({"weight": -1}, {}, r"concepts\[1\].weight: expected a positive number, got -1"),
    ({"weight": 0.333}, {}, r"concepts\[1\].weight: expected two decimals at most, got 0.333"),
    ({"wait": 1}, {}, r"concepts\[1\].wait: unknown key .*'weight'"),
    ({}, {"turn": 0}, "turn: expected 1 or more, got 0"),
    ({"weight": 0.3}, {"turn": 1}, "turn: expected a multiple of 10, so that turn x weight is"),
])  # fmt: skip
def test_lists_that_are_refused(roots, second, params, message):
    paths = {
        key: str(roots / text) for key, text in second.items() if key.endswith("root") and text
    }
    with pytest.raises(UserError, match=message) as error:
        changed(roots, second | paths, **params)
    assert "\n" not in str(error.value)


def test_what_is_no_list_of_subjects_is_refused(roots):
    for concepts, message in [
        ([], "concepts: expected a list of subjects"),
        ({"a": 1}, "concepts: expected a list of subjects"),
        (["dog"], r"concepts\[0\]: expected a mapping"),
        ([{"data_root": str(roots / "dog")}], r"concepts\[0\]: ConceptOptions needs class_word"),
    ]:
        with pytest.raises(UserError, match=message):
            joint(concepts)
    train = {"target": PERSONALIZED, "params": {"data_root": str(roots / "dog"), "size": 4}}
    with pytest.raises(UserError, match=r"train.params.data_root: .*leave --data_root out"):
        DataModuleFromConfig(1, train=train, concepts=[entry(roots, "cat")], num_workers=0)
    with pytest.raises(UserError, match="turn: says how concepts take turns, and there is one"):
        DataModuleFromConfig(1, train=train, turn=3, num_workers=0)
