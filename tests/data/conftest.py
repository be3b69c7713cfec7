"""The reference's numbers, and the image that they are of."""

import json
from pathlib import Path

import numpy as np
import pytest

DATA = Path(__file__).parent


@pytest.fixture(scope="session")
def golden():
    return np.load(DATA / "tiny_io.npz")


@pytest.fixture(scope="session")
def meta():
    return json.loads((DATA / "tiny_meta.json").read_text())


@pytest.fixture
def one(tmp_path):
    """A folder with the image of the golden numbers."""
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "image.png").write_bytes((DATA / "data_100x80.png").read_bytes())
    return tmp_path / "one"
