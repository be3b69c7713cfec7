"""What is measured of styles, materials, views and accessories."""

import pytest
import torch
from PIL import Image
from torch import nn

from ldm.evaluation.metrics import Recognizer
from ldm.rng import generator
from ldm.tiny.attributes import (
    KINDS,
    PER_WORD,
    classes_by_word,
    fit_attribute_judge,
    make_attribute_judge,
    measure_applications,
    measure_attributes,
    with_each_word,
)
from ldm.tiny.captions import prompt_with
from ldm.tiny.measure import SIZE, measure_decoder
from ldm.tiny.world import World

WORDS = [(kind, word) for kind, words in KINDS.items() for word in words]


class GreyJudge(Recognizer):
    """Reads the number of a word off a picture's grey level, which is what `grey` draws."""

    def features(self, images):
        return ((images.mean((1, 2, 3), keepdim=False)[:, None] + 1) * 127.5).round()

    def recognise(self, features, name):
        found = [
            WORDS[int(level) - 1] if 0 < level <= len(WORDS) else ("", "") for level in features
        ]
        return [word if kind == name else "" for kind, word in found]


def grey(prompt: str) -> Image.Image:
    """Draw the grey level of the longest word in a prompt: "red hat" holds more than "hat"."""
    said = [number for number, (_, word) in enumerate(WORDS) if word in prompt]
    level = max(said, key=lambda number: len(WORDS[number][1])) + 1 if said else 0
    return Image.new("RGB", (SIZE, SIZE), (level, level, level))


def judge() -> GreyJudge:
    return GreyJudge([], {kind: ["", *words] for kind, words in KINDS.items()})


@pytest.mark.parametrize(
    "kind, word, prompt",
    [
        ("style", "pixel art", "pixel art of a sks dog"),
        ("style", "oil painting", "an oil painting of a sks dog"),
        ("material", "golden", "photo of a golden sks dog"),
        ("view", "from behind", "photo of a sks dog from behind"),
        ("view", "close-up", "a close-up photo of a sks dog"),
        ("accessory", "wearing a red hat", "photo of a sks dog wearing a red hat"),
    ],
)
def test_a_word_is_asked_for_as_captions_say_it(kind, word, prompt):
    assert prompt_with(kind, word, "sks dog") == prompt


def test_classes_that_cannot_show_a_word_are_not_asked_for_it(toys):
    classes = classes_by_word(World(toys, labels=True), tries=400)
    assert classes["view", "from behind"] == ["dog"]
    assert classes["accessory", "wearing a red hat"] == ["dog"]
    assert set(classes["style", "pixel art"]) == {"dog", "vase"}


def test_what_is_drawn_as_asked_is_found(toys):
    world = World(toys, labels=True)
    right = measure_attributes(
        lambda prompts: [grey(p) for p in prompts], judge(), world, world, ceiling=60
    )
    assert all(right[kind] == 1 for kind in KINDS)

    def forgets_glass(prompts):
        return [grey(prompt.replace("glass ", "")) for prompt in prompts]

    wrong = measure_attributes(forgets_glass, judge(), world, world, ceiling=60)
    assert wrong["by material"] == {**dict.fromkeys(KINDS["material"], 1.0), "glass": 0.0}
    assert wrong["material"] == 1 - 1 / len(KINDS["material"])


def test_applications_say_how_far_the_subject_came():
    photos = torch.eye(8).repeat(1, SIZE * SIZE * 3 // 8).reshape(8, 3, SIZE, SIZE)

    def encoder(images):
        level = images.mean((1, 2, 3))
        return torch.stack([torch.ones_like(level), level], 1)

    words = {"view": ["from behind", "from above"]}
    draw = lambda prompts: [grey(prompt) for prompt in prompts]  # noqa: E731
    measured = measure_applications(draw, draw, photos, "dog", judge(), {"E": encoder}, words)
    assert measured == {"view": 1.0, "view, base": 1.0, "view, E gap closed": 0.0}
    assert len(draw(["a"] * PER_WORD)) == PER_WORD


def test_a_judge_learns_from_renderings(toys):
    class Pooled(nn.Module):
        def forward(self, images):
            return nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)

    world = World(toys, labels=True)
    fitted = make_attribute_judge(Pooled())
    fit_attribute_judge(fitted, world, lambda images: images, count=24)
    images = torch.stack([torch.as_tensor(world[i]["image"]) for i in range(20)])
    found = fitted.recognise(fitted.features(images.permute(0, 3, 1, 2)), "view")
    assert set(found) <= {"", *KINDS["view"]} and len(found) == 20


def test_every_word_is_in_enough_of_the_pictures_that_a_judge_learns_from(toys):
    world = World(toys, labels=True)
    numbers = with_each_word(world, 600, each=5)
    assert len(set(numbers)) == 600 and numbers == sorted(numbers)
    shown = [world.describe(generator("attributes", number)) for number in numbers]
    counts = {word: sum(getattr(s, kind) == word for s in shown) for kind, word in WORDS}
    assert min(counts.values()) >= 5
    # A world without heads has nothing that wears a hat, and the search ends.
    assert len(with_each_word(World(toys, classes=["vase"], labels=True), 30, each=5)) == 30


def test_the_decoder_is_measured_in_decibels(toys):
    world = World(toys, labels=True)
    off = measure_decoder(lambda images: (images + 0.2).where(images < 0, images - 0.2), world, 4)
    assert off == pytest.approx(20.0, abs=0.01)  # 0.2 of a range of 2 is 20 dB
