"""Toys: every class has builders, a design is always the same, and a cut-out shows it from the side
that was asked.
"""

import json

import numpy as np
import pytest
from PIL import Image

from ldm.tiny.renderer import cut_out
from ldm.tiny.shapes import lathe, slab, speckles, sphere, tube, weave
from ldm.tiny.toys import BUILDERS, build
from ldm.tiny.views import CAMERAS_OF
from scripts.tiny import render_subjects, render_toys


def colours(toy):
    return [part.colour for part in toy.parts]


@pytest.mark.parametrize("class_word", BUILDERS)
def test_a_design_is_the_same_every_time_and_designs_differ(class_word):
    assert colours(build(class_word, 3)) == colours(build(class_word, 3))
    designs = {tuple(colours(build(class_word, number))) for number in range(12)}
    assert len(designs) >= 3
    points = np.random.default_rng(0).uniform(-1.5, 2.5, (3, 200)).astype(np.float32)
    distances = [build(class_word, number).parts[0].shape(points) for number in (0, 0, 1)]
    np.testing.assert_array_equal(distances[0], distances[1])


@pytest.mark.parametrize("class_word", BUILDERS)
def test_a_toy_stands_on_the_ground_within_the_lattice(class_word):
    for number in range(2):
        toy = build(class_word, number)
        solid = toy.solid(cells=24) + np.array([[0], [1], [0]])
        if class_word != "glasses":  # they hang in the air
            assert -0.3 < solid[1].min() < 0.45 and np.ptp(solid[1]) > 0.5
        assert np.abs(solid).max() < 3.0


def test_a_cut_out_is_trimmed_and_knows_its_head():
    image, anchors = cut_out(build("penguin", 0), yaw=0, pitch=9, size=24)
    alpha = np.asarray(image)[..., 3]
    assert image.mode == "RGBA" and all(
        (edge > 0).any() for edge in (alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1])
    )
    assert set(anchors) == {"crown", "eyes", "neck"}
    assert abs(anchors["eyes"][0] - 0.5) < 0.06
    assert anchors["crown"][1] < anchors["eyes"][1] < anchors["neck"][1] < 0.7
    again, _ = cut_out(build("penguin", 0), yaw=0, pitch=9, size=24)
    np.testing.assert_array_equal(np.asarray(image), np.asarray(again))


def test_a_positive_yaw_looks_to_the_right():
    for yaw, side in ((60, 1), (-60, -1)):
        _, anchors = cut_out(build("dog", 0), yaw=yaw, pitch=9, size=16)
        assert (anchors["eyes"][0] - 0.5) * side > 0.1


def test_a_penguin_is_white_in_front_and_dark_behind():
    front, back = (
        np.asarray(cut_out(build("penguin", 0), yaw, 9, 16)[0], float) for yaw in (0, 180)
    )
    middle = [image[image.shape[0] // 2, image.shape[1] // 2, :3].mean() for image in (front, back)]
    assert middle[0] > 150 > 90 > middle[1]


def test_rendering_writes_what_is_missing(tmp_path, capsys):
    arguments = ["--outdir", str(tmp_path), "--classes", "can", "--designs", "1", "--size", "12"]
    render_toys.main(arguments)
    paths = sorted(tmp_path.glob("*/*.png"))
    assert [path.name for path in paths] == sorted(
        f"toy-can00@{camera}.png" for camera in CAMERAS_OF["can"]
    )
    with Image.open(paths[0]) as image:
        assert json.loads(image.text["anchors"]) == {} and max(image.size) <= 12
    paths[0].write_bytes(b"mine")
    render_toys.main(arguments)
    assert paths[0].read_bytes() == b"mine"
    assert "1 designs of 1 classes" in capsys.readouterr().out


def test_the_held_out_subjects_are_not_among_the_toys():
    """Their colours and markings are their own: no design has the same parts."""
    held_out = {
        name: [part.colour for part in make().parts] for name, make in render_subjects.TOYS.items()
    }
    for name, wanted in held_out.items():
        class_word = name.rstrip("0123456789").replace("_", " ")
        for number in range(12):
            shared = set(colours(build(class_word, number))) & set(wanted)
            assert len(shared) / len(set(wanted)) <= 0.5, (name, number)


@pytest.mark.parametrize("texture", [speckles(20, 0.4), weave(40, 0.3)], ids=["speckles", "weave"])
def test_a_texture_is_uneven_light_around_one(texture):
    points = np.random.default_rng(0).uniform(-1, 2, (3, 2000)).astype(np.float32)
    light = texture(points)
    np.testing.assert_array_equal(light, texture(points))
    assert 0.8 < light.mean() < 1.1 and 0.02 < light.std() < 0.3 and light.min() > 0.3


def test_a_lens_blurs_what_is_behind_and_darkens_the_corners():
    light = np.random.default_rng(0).random((3, 32, 32), np.float32)
    blurred = render_subjects.defocused(light, 0.05)
    assert blurred.shape == light.shape and blurred.std() < 0.5 * light.std()
    assert blurred.mean() == pytest.approx(light.mean(), abs=0.02)
    photo = render_subjects.photographed(
        np.full((3, 32, 32), 0.5, np.float32), np.random.default_rng(0)
    )
    assert photo[:, 14:18, 14:18].mean() > photo[:, :3, :3].mean() + 0.05


def test_shapes_are_where_they_should_be():
    def at(shape, *point):
        return float(shape(np.array(point, np.float32)[:, None])[0])

    assert at(sphere((0, 1, 0), 0.5), 0, 2, 0) == pytest.approx(0.5)
    vase = lathe([(0.5, 0.0), (0.8, 1.0), (0.4, 2.0)], wall=0.1)
    assert at(vase, 0.75, 1, 0) < 0 < at(vase, 0.3, 1, 0) and at(vase, 0, 0.05, 0) < 0 < at(
        vase, 0, 2.3, 0
    )
    sole = slab((0, 0.1, 0), (0.4, 0.1, 1.0))
    assert at(sole, 0, 0.1, 0.9) < 0 < at(sole, 0.39, 0.1, 0.9)
    bent = tube([(0, 0, 0), (1, 0, 0), (1, 1, 0)], 0.1, joints=6)
    assert at(bent, 1, 1, 0) < 0 < at(bent, 0, 1, 0)
