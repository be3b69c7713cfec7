"""Room on the disk: compared before a training starts, and what is lost when it runs out."""

from types import SimpleNamespace

import pytest

import main
from ldm.training import disk
from tests.support.exact import EMA, smallest
from tests.support.runs import Workspace

STEPS = 6
NAMED = "about (.*) and the disk"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("disk"))


@pytest.fixture(scope="module")
def base(workspace):
    return smallest(workspace, STEPS)


@pytest.fixture
def free(monkeypatch):
    """Set what the disk says that it has, now and from some later question on."""

    def set_free(now, later=None, questions=1):
        asked = []

        def usage(path):
            asked.append(path)
            is_later = later is not None and len(asked) > questions
            return SimpleNamespace(free=later if is_later else now)

        monkeypatch.setattr("shutil.disk_usage", usage)

    return set_free


@pytest.mark.parametrize("more", [[], [EMA], ["model.params.cond_stage_trainable=true"]])
def test_the_estimate_is_what_a_checkpoint_takes(workspace, base, monkeypatch, more):
    found = []
    needed = disk.needed
    monkeypatch.setattr(disk, "needed", lambda *args: found.append(needed(*args)) or found[-1])
    name = f"estimate{len(more[0]) if more else 0}"
    every = "lightning.modelcheckpoint.params.every_n_train_steps=2"
    run = workspace.train(
        name, *more, every, "lightning.modelcheckpoint.params.save_top_k=-1", base=base
    )
    (need,) = found
    sizes = [path.stat().st_size for path in run.glob("checkpoints/epoch*.ckpt")]
    assert need.checkpoints == len(sizes) == 3 and need.most == 3 * need.checkpoint
    tensors = 0.6 * max(sizes)  # the rest of such a small file is names and the config
    assert tensors < need.checkpoint <= max(sizes)


def test_no_room_for_one_checkpoint_ends_it_before_work_starts(workspace, base, free, caplog):
    free(1000)
    more = ["data.params.num_class_images=9", "data.params.class_images={steps: 1}"]
    assert main.main(workspace.arguments("none", *more, base=base)) == 1
    (error,) = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert "a checkpoint of this run takes about" in error
    assert error.endswith("the disk has 1 kB free: make room, or write elsewhere")
    assert len(list(workspace.class_images.iterdir())) == 4
    assert not list(workspace.logs.glob("*_none"))


def test_no_room_for_all_of_them_is_a_warning(workspace, base, free, caplog):
    free(40_000_000, later=10**12)
    every = "lightning.modelcheckpoint.params.every_n_train_steps=1"
    keep = "lightning.modelcheckpoint.params.save_top_k=-1"
    workspace.train("some", every, keep, base=base)
    (warning,) = [text for text in caplog.messages if "checkpoints of this run take" in text]
    assert "the 6 checkpoints" in warning and "the disk has 40 MB free" in warning


def test_a_disk_that_is_full_before_the_first_checkpoint_says_what_is_lost(
    workspace, base, free, caplog
):
    free(10**12, later=1000)
    every = "lightning.modelcheckpoint.params.every_n_train_steps=3"
    assert main.main(workspace.arguments("first", every, base=base)) == 1
    assert "no step is saved yet (steps 1 to 3 are lost): start it again" in caplog.text


def test_a_checkpoint_that_cannot_be_written_keeps_the_old_one(workspace, base, free, caplog):
    run = workspace.train("full", "--max_steps", "2", base=base)
    before = (run / "checkpoints/last.ckpt").read_bytes()
    free(10**12, later=1000)
    assert main.main(["-r", str(run), "--max_steps", "4"]) == 1
    assert "not written: it needs" in caplog.text
    assert "no further step is saved (steps 3 to 4 are lost)" in caplog.text
    assert (run / "checkpoints/last.ckpt").read_bytes() == before
