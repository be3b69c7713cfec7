"""The benchmark measures starts with many class images; how fast they are, no test asks."""

import pytest
from PIL import Image

from ldm.benchmark import class_images, machine
from ldm.data import image_folder
from ldm.data.checked import hash_of
from scripts import benchmark
from tests.support.benchmarks import measured

SIZE = 64


@pytest.fixture
def decoded(monkeypatch, tmp_path):
    """Measure in this process; a clock that counts the images decoded so far, instead of time."""
    names, load = [], image_folder.load_image
    monkeypatch.setattr(class_images, "in_own_process", lambda function, *given: function(*given))
    monkeypatch.setattr(image_folder, "LONG_CHECK", 5)
    monkeypatch.setattr(
        image_folder, "load_image", lambda path: names.append(path.name) or load(path)
    )
    monkeypatch.setitem(machine.CLOCKS, "cpu", lambda: float(len(names)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "the user's"))
    monkeypatch.chdir(tmp_path)
    return names


def test_the_next_start_reads_without_decoding(decoded, tmp_path, capsys):
    flags = ["class_images", "--count", 3, 30, "--size", SIZE, "--clock", "cpu"]
    found = measured(tmp_path, *flags)
    few, many = found["rows"]
    assert (few["count"], many["count"]) == (3, 30) and many["bytes"] > 9 * few["bytes"]
    of_check = [
        (row["first"]["check_seconds"], row["next"]["check_seconds"]) for row in (few, many)
    ]
    assert of_check == [(3, 3), (30, 0)], "3 are too few to be remembered"
    # What the check has decoded is kept, so that an example decodes only after the next start.
    assert [many[start]["examples_seconds"] for start in ("first", "next")] == [0, 20]
    assert {many[start]["open_seconds"] for start in ("first", "next")} == {0}
    assert all(row[start]["peak_bytes"] >= 0 for row in (few, many) for start in ("first", "next"))
    lines = capsys.readouterr().out.splitlines()
    assert [cell.strip() for cell in lines[-1].split("|")[4:8]] == ["30", "0", "0", "20"]
    assert not list(tmp_path.glob(".benchmark*")) and not (tmp_path / "the user's").exists()


def test_no_two_images_are_the_same(tmp_path):
    total = class_images.write_class_images(tmp_path / "images", 40, class_images.SMALLEST)
    paths = sorted((tmp_path / "images").iterdir())
    assert total == sum(path.stat().st_size for path in paths)
    assert {path.stat().st_nlink for path in paths} == {1}
    pixels = {hash_of(Image.open(path).tobytes()) for path in paths}
    assert len(paths) == len(pixels) == 40


def test_an_image_of_512_pixels_has_about_60_kB():
    bases = class_images.base_pictures(512)
    assert all(50e3 < len(class_images.jpeg(bases, number)) < 70e3 for number in range(4))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--count", "10", "0"], "--count 0: expected at least 1"),
        (["--size", "15"], "--size 15: expected at least 16"),
        (["--count", "1000000000"], "--count 1000000000: 1000000000 class images need about "),
    ],
)
def test_what_cannot_be_measured_is_one_line(tmp_path, monkeypatch, caplog, flags, message):
    monkeypatch.chdir(tmp_path)
    assert benchmark.main(["class_images", *flags]) == 1
    assert message in caplog.messages[-1] and "\n" not in caplog.messages[-1]
    assert not list(tmp_path.iterdir())
