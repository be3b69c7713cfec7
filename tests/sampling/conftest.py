"""The shipped miniature, read once, behind the sampling commands."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from torch import nn

from ldm.sampling import flags
from ldm.tiny.miniature import WEIGHTS
from scripts import txt2img
from tests.support.models import with_own_parts

_load = functools.cache(flags.load_model)


def load_once(*arguments, **named) -> nn.Module:
    """Return a model whose weights are read once. A command may free parts of its own."""
    return with_own_parts(_load(*arguments, **named))


@pytest.fixture
def model_once(monkeypatch):
    """Let the commands read each model once for all tests; the models that they got, in order."""
    loaded = []

    def load(*arguments, **named):
        loaded.append(load_once(*arguments, **named))
        return loaded[-1]

    monkeypatch.setattr(flags, "load_model", load)
    return loaded


@pytest.fixture
def draw(model_once, tmp_path):
    """Call txt2img.py on the miniature; the pictures that it has added to a folder."""

    def call(*arguments: object, outdir: str = "out", status: int = 0) -> list[Path]:
        folder = tmp_path / outdir / "samples"
        before = set(folder.glob("*"))
        command = [] if "--like" in arguments else ["--ckpt", str(WEIGHTS), "--skip_grid"]
        command += ["--outdir", str(tmp_path / outdir), *map(str, arguments)]
        assert txt2img.main(command) == status
        return sorted(set(folder.glob("*")) - before)

    return call
