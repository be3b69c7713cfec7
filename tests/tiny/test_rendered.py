"""Pictures that were drawn before are the world's, and later shards are read, too."""

import numpy as np
import pytest

from ldm.errors import UserError
from ldm.rng import generator
from ldm.tiny import rendered
from ldm.tiny.rendered import RenderedWorld, write_shard
from ldm.tiny.world import LABELS, World
from scripts.tiny import render_world


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(rendered, "SHARD", 3)
    monkeypatch.setattr(render_world, "SHARD", 3)


def test_pictures_are_the_worlds(toys, tmp_path):
    dataset = World(toys, size=16, labels=True)
    for number in range(2):
        write_shard(dataset, tmp_path, number)
    read = RenderedWorld(tmp_path, labels=True)
    assert len(read) == read.n_images == 6
    for index in range(6):
        drawn = dataset.example(0, generator("world", index))
        np.testing.assert_allclose(read[index]["image"], drawn["image"], atol=1e-6)
        names = ("caption", *LABELS)
        assert [read[index][name] for name in names] == [drawn[name] for name in names]
    assert set(RenderedWorld(tmp_path)[0]) == {"image", "caption"}


def test_shards_that_come_later_are_read(toys, tmp_path):
    dataset = World(toys, size=16, labels=True)
    write_shard(dataset, tmp_path, 0)
    read = RenderedWorld(tmp_path, length=6)
    assert read[4]["caption"] == read[1]["caption"]
    write_shard(dataset, tmp_path, 1)
    assert read[4]["caption"] == dataset.example(0, generator("world", 4))["caption"]


def test_drawing_goes_on_where_it_was_stopped(toys, tmp_path, capsys):
    arguments = ["--outdir", str(tmp_path / "out"), "--sprites", str(toys), "--count", "5"]
    arguments += ["--classes", "all"]
    assert render_world.main(arguments) == 0
    assert sorted(path.name for path in (tmp_path / "out").glob("*")) == [
        "0000.safetensors",
        "0001.safetensors",
    ]
    (tmp_path / "out" / "0001.safetensors").unlink()
    capsys.readouterr()
    render_world.main(arguments)
    assert capsys.readouterr().out.strip().endswith("0001.safetensors")


def test_a_class_without_sprites_is_named(toys, tmp_path, caplog):
    arguments = ["--outdir", str(tmp_path), "--sprites", str(toys), "--classes", "zebra"]
    assert render_world.main(arguments) == 1
    assert "unknown class 'zebra'" in caplog.text


def test_an_empty_folder_names_the_script(tmp_path):
    with pytest.raises(
        UserError, match=r"no pictures; draw them with: python scripts/tiny/render_world\.py"
    ):
        RenderedWorld(tmp_path)
