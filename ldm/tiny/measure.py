"""The measurements of `docs/results.md`: the base miniature, and DreamBooth with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm.evaluation.metrics import (
    Encoder,
    Recognizer,
    accuracy,
    centred_similarity,
    diversity,
    features_of,
    frechet_distance,
    gap_closed,
    middle,
    nearest_psnr,
    similarity,
    similarity_within,
    to_tensor,
)
from ldm.rng import generator
from ldm.tiny.scenes import PLAIN, SCENES
from ldm.tiny.world import LABELS, World, with_article

Draw = Callable[[Sequence[str]], list[Image.Image]]
Reconstruct = Callable[[Tensor], Tensor]  # pictures, encoded and decoded by the first stage

SIZE = 64
CLASS_IMAGES = 64  # pictures of a class that similarity and diversity are measured on
SUBJECT_IMAGES = 16  # pictures of "photo of a sks dog"
PER_PROMPT = 4  # pictures of each class, and of each scene
FRECHET = 1000  # pictures whose distribution is compared with that of renderings
OF_EACH_CLASS = 32  # pictures that the diversity of one class is measured on
PLACES = [scene for scene in SCENES if scene not in PLAIN]


@dataclass(frozen=True)
class Judges:
    """What looks at pictures: encoders by name, and a recognizer of classes and scenes."""

    encoders: Mapping[str, Encoder]
    recognizer: Recognizer

    def recognise(self, images: Tensor, name: str) -> list[str]:
        """Return the most likely label of each image, of those that `name` can have."""
        return self.recognizer.recognise(self.recognizer.features(images), name)


def renderings(
    world: World, numbers: int | Sequence[int], key: str
) -> tuple[Tensor, dict[str, list[str]]]:
    """Draw pictures of a world.

    Args:
        numbers: how many, or which ones.
        key: another key gives other pictures for the same numbers.

    Returns:
        The pictures (count, 3, size, size) in [-1, 1], and for each name of `LABELS` theirs.
    """
    chosen = range(numbers) if isinstance(numbers, int) else numbers
    examples = [world.example(0, generator(key, number)) for number in chosen]
    pictures = torch.stack([torch.as_tensor(example["image"]) for example in examples])
    images = pictures.permute(0, 3, 1, 2).contiguous()
    labels = {}
    for name in LABELS:
        labels[name] = [example[name] for example in examples]
    return images, labels


def make_recognizer(encoder: Encoder, classes: Sequence[str]) -> Recognizer:
    """Make a recognizer of the world's classes and scenes that has not been fitted."""
    return Recognizer([encoder], {"class_word": classes, "scene": list(SCENES)})


def fit_recognizer(
    recognizer: Recognizer, train: World, reconstruct: Reconstruct, count: int = 6000
) -> None:
    """Fit a recognizer to `count` renderings, half of them encoded and decoded by the first stage.

    Samples come out of the same decoder. What the decoder does to a picture should not make one
    class more likely than another.
    """
    images, found = renderings(train, count, "recognizer")
    images[::2] = features_of(reconstruct, images[::2]).clamp(-1, 1)
    labels = recognizer.labels
    targets = {
        name: torch.tensor([labels[name].index(value) for value in found[name]]) for name in labels
    }
    recognizer.fit(recognizer.features(images), targets)


def class_prompts(classes: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return `PER_PROMPT` prompts for each class, and the class that each asks for."""
    wanted = [class_word for class_word in classes for _ in range(PER_PROMPT)]
    return [f"a photo of {with_article(class_word)}" for class_word in wanted], wanted


def scene_prompts(classes: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return `PER_PROMPT` prompts for each scene, and the scene that each asks for.

    The classes take turns.
    """
    wanted = [scene for scene in SCENES for _ in range(PER_PROMPT)]
    nouns = [with_article(classes[number % len(classes)]) for number in range(len(wanted))]
    return [f"a photo of {noun} {scene}" for noun, scene in zip(nouns, wanted)], wanted


def accuracy_by(wanted: Sequence[str], found: Sequence[str]) -> dict[str, float]:
    """Return wanted label -> the share of right answers where it was wanted."""
    shares: dict[str, float] = {}
    for label in dict.fromkeys(wanted):
        answers = [answer for answer, asked in zip(found, wanted) if asked == label]
        shares[label] = accuracy(answers, [label] * len(answers))
    return shares


def measure_base(
    draw: Draw, judges: Judges, train: World, test: World, class_word: str = "dog"
) -> dict[str, Any]:
    """Measure how often the base model shows what is asked for, and how varied its pictures are.

    The same is measured of renderings, for comparison.
    """
    # Classes and scenes in samples.
    prompts, wanted = class_prompts(train.classes)
    found = judges.recognise(to_tensor(draw(prompts), SIZE), "class_word")
    scene_texts, scenes = scene_prompts(train.classes)
    found_scenes = judges.recognise(to_tensor(draw(scene_texts), SIZE), "scene")
    measured: dict[str, Any] = {
        "class": accuracy(found, wanted),
        "scene": accuracy(found_scenes, scenes),
        "by_class": accuracy_by(wanted, found),
    }

    # The ceiling: what the judges find in renderings, of designs they learned from and others.
    for name, world in (("seen designs", train), ("unseen designs", test)):
        images, labels = renderings(world, 600, "ceiling")
        measured[f"class, {name}"] = accuracy(
            judges.recognise(images, "class_word"), labels["class_word"]
        )
        measured[f"scene, {name}"] = accuracy(judges.recognise(images, "scene"), labels["scene"])

    # How varied pictures of one class are.
    made = to_tensor(draw([f"a photo of a {class_word}"] * CLASS_IMAGES), SIZE)
    only = World(train.root, SIZE, [class_word], labels=True)
    real, _ = renderings(only, CLASS_IMAGES, "diversity")
    for name, encoder in judges.encoders.items():
        measured[f"diversity, {name}"] = diversity(features_of(encoder, made))
        measured[f"diversity of renderings, {name}"] = diversity(features_of(encoder, real))
    return measured


def measure_pictures(draw: Draw, encoder: Encoder, test: World, train: World) -> dict[str, Any]:
    """Measure how near samples are to unseen renderings, and how varied those of every class are.

    Returns:
        "fréchet": distance of the features of `FRECHET` samples to those of as many renderings
        with the same captions.
        "fréchet of renderings": the same for renderings of seen designs, the best that a model of
        these could reach.
        "diversity by class": class -> the diversity of samples, as a share of that of renderings.
    """
    real = features_of(encoder, renderings(test, FRECHET, "fréchet")[0])
    captions = [test.describe(generator("fréchet", n)).caption for n in range(FRECHET)]
    made = features_of(encoder, to_tensor(draw(captions), SIZE))
    seen = features_of(encoder, renderings(train, FRECHET, "fréchet, seen")[0])
    by_class: dict[str, float] = {}
    for class_word in train.classes:
        drawn = draw([f"a photo of {with_article(class_word)}"] * OF_EACH_CLASS)
        only = World(train.root, SIZE, [class_word], labels=True, plain=True)
        shown, _ = renderings(only, OF_EACH_CLASS, "diversity")
        of_samples = diversity(features_of(encoder, to_tensor(drawn, SIZE)))
        by_class[class_word] = of_samples / diversity(features_of(encoder, shown))
    return {
        "fréchet": frechet_distance(made, real),
        "fréchet of renderings": frechet_distance(seen, real),
        "diversity by class": by_class,
    }


def measure_decoder(reconstruct: Reconstruct, world: World, count: int = 300) -> float:
    """Return the mean peak signal-to-noise ratio, in dB, of encoded and decoded renderings."""
    images, _ = renderings(world, count, "decoder")
    errors = (features_of(reconstruct, images).clamp(-1, 1) - images) / 2
    return float((-10 * errors.square().mean((1, 2, 3)).log10()).mean())


def subject_prompts(noun: str) -> tuple[list[str], list[str]]:
    """Return a prompt for a noun in every place of the paper's prompts, and these places."""
    return [f"photo of a {noun} {scene}" for scene in PLACES], PLACES


def measure_subject(
    base: Draw, tuned: Draw, photos: Sequence[Image.Image], class_word: str, judges: Judges
) -> dict[str, Any]:
    """Measure what DreamBooth did: subject fidelity, scenes, copies, and what is left of the class.

    Likeness is that of the pictures' middles. The photos were taken in five places, and the
    features depend on the place at least as much as on the thing. Diversity is that of whole
    pictures, as of the base model.

    Args:
        base: draws with the model before.
        tuned: draws with the model after.
        photos: the training images.
    """
    real = to_tensor(photos, SIZE)
    subject_prompt, class_prompt = f"photo of a sks {class_word}", f"photo of a {class_word}"
    subject = to_tensor(tuned([subject_prompt] * SUBJECT_IMAGES), SIZE)
    before = to_tensor(base([class_prompt] * CLASS_IMAGES), SIZE)
    after = to_tensor(tuned([class_prompt] * CLASS_IMAGES), SIZE)

    # The places: with the subject in them, and with the class by the base model.
    scenes: dict[str, float] = {}
    for name, draw, noun in (("base", base, class_word), ("tuned", tuned, f"sks {class_word}")):
        prompts, wanted = subject_prompts(noun)
        scenes[name] = accuracy(judges.recognise(to_tensor(draw(prompts), SIZE), "scene"), wanted)

    # Copies of training images, and whether the class is still its class.
    class_words = [class_word] * CLASS_IMAGES
    measured: dict[str, Any] = {
        "scenes, base": scenes["base"],
        "scenes": scenes["tuned"],
        "nearest training image, dB": float(nearest_psnr(subject, real).max()),
        "class kept": accuracy(judges.recognise(after, "class_word"), class_words),
        "class, base": accuracy(judges.recognise(before, "class_word"), class_words),
    }

    # Likeness, by each encoder: how far the subject came from the class to the photos.
    for name, encoder in judges.encoders.items():
        of_real, of_subject, of_before, of_after = (
            features_of(encoder, middle(x)) for x in (real, subject, before, after)
        )
        reached, start = similarity(of_subject, of_real), similarity(of_before, of_real)
        ceiling = similarity_within(of_real)
        varied = diversity(features_of(encoder, before))
        measured |= {
            f"{name}, subject": reached,
            f"{name}, base": start,
            f"{name}, ceiling": ceiling,
            f"{name}, gap closed": gap_closed(reached, start, ceiling),
            f"{name}, class drift": centred_similarity(of_after, of_real, of_before),
            f"{name}, centred subject": centred_similarity(of_subject, of_real, of_before),
            f"{name}, diversity kept": diversity(features_of(encoder, after)) / varied,
        }
    return measured
