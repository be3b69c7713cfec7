"""The sheet of labelled pictures, the subject photos that ship with the project, and the script
behind them.
"""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.errors import UserError
from ldm.sampling.contact_sheet import contact_sheet

ROOT = Path(__file__).parents[2]
SUBJECTS = ROOT / "models/tiny/subjects"
RED, BLUE = (255, 0, 0), (0, 0, 255)


def plain(colour: tuple[int, int, int], width: int = 32, height: int = 32) -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def count(sheet: Image.Image, colour: tuple[int, int, int]) -> int:
    return int((np.asarray(sheet) == colour).all(-1).sum())


def test_sheet_grows_with_rows_columns_title_and_captions():
    one = contact_sheet([("a", [plain(RED)])], cell=32)
    assert contact_sheet([("a", [plain(RED)] * 3)], cell=32).width > one.width + 64
    assert contact_sheet([("a", [plain(RED)]), ("b", [])], cell=32).height > one.height
    assert contact_sheet([("a", [plain(RED)])] * 2, cell=32).height > one.height + 32
    assert contact_sheet([("a", [plain(RED)])], cell=32, title="all").height > one.height
    assert contact_sheet([("a", [("step 1", plain(RED))])], cell=32).height > one.height
    assert contact_sheet([("a photo of a sks robot", [plain(RED)])], cell=32).width > one.width


def test_every_picture_is_on_the_sheet_with_its_proportions():
    rows = [
        ("one", [plain(RED)]),
        ("three", [plain(BLUE, 16, 8), ("note", plain(BLUE, 16, 16)), plain(RED)]),
    ]
    sheet = contact_sheet(rows, cell=32, title="title")
    assert count(sheet, RED) == 2 * 32 * 32
    assert count(sheet, BLUE) == 32 * 16 + 32 * 32


def test_a_picture_of_the_cell_size_keeps_its_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
    sheet = np.asarray(contact_sheet([("", [Image.fromarray(pixels)])], cell=24))
    windows = np.lib.stride_tricks.sliding_window_view(sheet, (24, 24, 3))
    assert (windows == pixels).all((-1, -2, -3)).any()


def test_transparent_pictures_show_the_paper():
    clear = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    assert contact_sheet([("", [clear])], cell=32).getextrema() == ((250, 250),) * 3


@pytest.mark.parametrize("texts", [{"label": "robot"}, {"title": "robot"}, {"caption": "robot"}])
def test_texts_are_drawn(texts):
    def sheet(label="", title="", caption=""):
        return contact_sheet(
            [(label, [(caption, plain(RED))]), ("wide enough", [])], cell=64, title=title
        )

    bare, written = (int((np.asarray(s).max(-1) < 160).sum()) for s in (sheet(), sheet(**texts)))
    assert written > bare


def test_empty_sheets_are_refused():
    with pytest.raises(UserError, match="needs rows"):
        contact_sheet([])


@pytest.mark.parametrize("name", ["robot", "dog", "dog2", "cat", "backpack", "teapot"])
def test_five_photos_of_every_subject_ship_with_the_project(name):
    photos = sorted((SUBJECTS / name).iterdir())
    assert [photo.name for photo in photos] == [f"{i:02}.jpg" for i in range(5)]
    for photo in photos:
        with Image.open(photo) as image:
            image.load()
            assert (image.mode, image.size) == ("RGB", (256, 256))
        assert photo.stat().st_size < 40_000


def test_the_script_that_renders_them_is_deterministic(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from scripts.tiny.render_subjects import main

    for folder in ("first", "second"):
        main(["--size", "32", "--subjects", "robot", "--outdir", str(tmp_path / folder)])
    first, second = (
        sorted((tmp_path / folder / "robot").iterdir()) for folder in ("first", "second")
    )
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    assert len({p.read_bytes() for p in first}) == 5


def test_the_committed_photos_are_what_the_script_renders(monkeypatch):
    """To within what JPEG and another processor's rounding change, at an eighth of the size."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from scripts.tiny.render_subjects import TOYS, render

    rendered = np.asarray(render(TOYS["teapot"](), 0, 32), np.float32)
    committed = Image.open(SUBJECTS / "teapot/00.jpg").resize((32, 32), Image.Resampling.BOX)
    assert np.abs(rendered - np.asarray(committed, np.float32)).mean() < 4
