"""What is measured of pictures: likeness, variety, copies, and what they show."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.finding import find_images
from ldm.data.reading import load_image
from ldm.evaluation.metrics import (
    EfficientNetLite0,
    EfficientNetMaps,
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
from ldm.tiny.measure import Judges, class_prompts, measure_subject, scene_prompts
from ldm.tiny.miniature import class_word_of, photos_of, subject_names

EAST, NORTH = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])


def test_similarity_is_the_mean_cosine_over_pairs():
    assert similarity(3 * EAST, torch.cat([EAST, NORTH])) == pytest.approx(0.5)
    assert similarity_within(torch.cat([EAST, 2 * EAST, NORTH])) == pytest.approx(1 / 3)


def test_centred_similarity_is_zero_without_change_and_one_at_the_subject():
    base = torch.cat([EAST, NORTH])
    subject = torch.tensor([[2.0, 1.0]])
    assert centred_similarity(base + torch.tensor([0.0, 1e-12]), subject, base) == pytest.approx(
        0, abs=1e-3
    )
    assert centred_similarity(subject, subject, base) == pytest.approx(1)
    assert centred_similarity(torch.cat([subject, base]), subject, base) == pytest.approx(
        1 / 3, abs=1e-3
    )
    assert centred_similarity(2 * base.mean(0) - subject, subject, base) == pytest.approx(-1)


def test_diversity_is_the_mean_distance_over_pairs():
    assert diversity(torch.cat([EAST, EAST, NORTH])) == pytest.approx(2 * math.sqrt(2) / 3)


def test_gap_closed():
    assert gap_closed(0.7, 0.5, 0.9) == pytest.approx(0.5)


def test_a_mirrored_copy_is_found():
    training = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noise = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    images = torch.cat([training[1:2].flip(-1), training[2:3] + 0.2 * noise, noise.clamp(-1, 1)])
    copy, noisy, other = nearest_psnr(images, training).tolist()
    assert copy > 60
    assert noisy == pytest.approx(20, abs=1)  # half of the deviation, in dB: values span 2
    assert other < 8


def test_a_recognizer_learns_what_its_encoder_sees():
    def mean_colour(images):
        return images.mean((2, 3))

    colours = {"red": (1, -1, -1), "green": (-1, 1, -1), "blue": (-1, -1, 1)}
    names = [list(colours)[n % 3] for n in range(60)]
    noise = torch.randn(60, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    images = torch.tensor([colours[name] for name in names]).float()[:, :, None, None] + noise
    recognizer = Recognizer([mean_colour], {"colour": list(colours)})
    targets = torch.tensor([list(colours).index(name) for name in names])
    recognizer.fit(recognizer.features(images[:45]), {"colour": targets[:45]})
    found = recognizer.recognise(recognizer.features(images[45:]), "colour")
    assert accuracy(found, names[45:]) == 1
    assert accuracy(found, ["red"] * 15) == pytest.approx(1 / 3)


def test_the_middle_of_a_picture_is_its_own_size_and_without_the_border():
    images = torch.zeros(1, 3, 64, 64)
    images[..., :9, :] = images[..., -9:, :] = images[..., :9] = images[..., -9:] = 1
    assert middle(images).shape == images.shape
    assert middle(images).abs().max() == 0


def test_efficientnet_tells_the_subjects_apart():
    encoder = EfficientNetLite0()
    sets = [
        [load_image(path) for path in find_images(photos_of(name))][:3]
        for name in ("dog", "teapot", "backpack")
    ]
    features = [features_of(encoder, to_tensor(images, 64)) for images in sets]
    torch.testing.assert_close(features[0].norm(dim=1), torch.ones(3))
    within = np.mean([similarity_within(f) for f in features])
    across = np.mean([similarity(features[a], features[b]) for a, b in ((0, 1), (0, 2), (1, 2))])
    assert within > across + 0.1


def test_maps_of_efficientnet_tell_where_a_picture_changes():
    image = to_tensor([load_image(find_images(photos_of("dog"))[0])], 64)
    changed = image.clone()
    changed[..., 48:, :16] *= -1  # the field at the bottom left, of 4 x 4
    encoder = EfficientNetMaps()
    before, after = features_of(encoder, image), features_of(encoder, changed)
    assert before.shape == (1, (40 + 112) * 16 + 1280)
    fields = (after - before)[:, : 40 * 16].reshape(40, 16).norm(dim=0)
    assert int(fields.argmax()) == 12 and fields[12] > 2 * fields[3]


def test_prompts_ask_for_every_class_and_scene_four_times():
    texts, wanted = class_prompts(["dog", "owl", "glasses"])
    assert texts[::4] == ["a photo of a dog", "a photo of an owl", "a photo of glasses"]
    assert wanted == ["dog"] * 4 + ["owl"] * 4 + ["glasses"] * 4
    texts, wanted = scene_prompts(["dog", "cat"])
    assert texts[:2] == ["a photo of a dog in the jungle", "a photo of a cat in the jungle"]
    assert all(text.endswith(scene) for text, scene in zip(texts, wanted))


def pictures_of(value):
    """A model that draws one gray, a little different every time."""

    def draw(prompts):
        values = [value + 3 * (number % 5) for number in range(len(prompts))]
        return [Image.new("RGB", (64, 64), (v, v, v)) for v in values]

    return draw


def test_measurements_of_a_subject():
    """With pixels for features, a base that draws dark and a tuned model that draws as bright as
    the photos.
    """

    def pixels(images):
        ones = torch.ones(len(images), 1)
        return torch.nn.functional.normalize(
            torch.cat([images.mean((1, 2, 3))[:, None], ones], 1), dim=-1
        )

    recognizer = Recognizer(
        [pixels], {"class_word": ["dog", "cat"], "scene": ["in the jungle", "in the snow"]}
    )
    brightness = torch.linspace(-1, 1, 40)
    images = brightness[:, None, None, None].expand(40, 3, 4, 4)
    targets = {"class_word": (brightness > 0).long(), "scene": (brightness > 0).long()}
    recognizer.fit(recognizer.features(images), targets)
    photos = pictures_of(200)(["photo"] * 5)
    judges = Judges({"pixels": pixels}, recognizer)
    found = measure_subject(pictures_of(20), pictures_of(200), photos, "dog", judges)
    assert found["pixels, gap closed"] == pytest.approx(1, abs=0.05)
    assert found["pixels, class drift"] == pytest.approx(
        1, abs=0.05
    )  # "a dog" is as bright as the subject, too
    assert found["class, base"] == 1 and found["class kept"] == 0
    assert found["nearest training image, dB"] > 60
    # One in 19 places is the jungle, which dark pictures are taken for; bright ones are the snow.
    assert found["scenes, base"] == found["scenes"] == pytest.approx(1 / 22)


def test_the_subjects_and_their_classes():
    assert {"dog", "dog2", "cat", "backpack", "teapot", "robot"} <= set(subject_names())
    assert class_word_of(photos_of("dog2")) == "dog"


def test_frechet_distance_of_moved_and_scaled_features():
    features = torch.randn(200, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-6)
    moved = 3 * features + torch.tensor([1.0, 0, 0, 0, 2])
    between_means = (moved.mean(0) - features.mean(0)).square().sum()
    # For covariances C and 9 C the trace's part is tr(C) + 9 tr(C) - 2 * 3 tr(C).
    expected = between_means + 4 * torch.cov(features.T).trace()
    assert frechet_distance(features, moved) == pytest.approx(float(expected), rel=1e-9)
