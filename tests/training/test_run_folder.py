"""Run folders: one for each run, for one command at a time, and nothing left of a start that was
refused.
"""

import datetime
import os
import shutil
import time

import pytest

import main
from ldm import signals
from ldm.errors import UserError
from ldm.training import cli, run
from ldm.training.run import Run, forget_stamp, held, new_run
from tests.support.runs import Workspace

V1 = "configs/stable-diffusion/v1-finetune_unfrozen.yaml"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("folders"))


class Stopped(datetime.datetime):
    """A clock that stands still."""

    @classmethod
    def now(cls, tz=None):
        return cls(2026, 1, 2, 3, 4, 5)


@pytest.fixture
def one_second(monkeypatch):
    monkeypatch.delenv(run.STAMP_VARIABLE, raising=False)
    monkeypatch.setattr(run.datetime, "datetime", Stopped)
    yield
    forget_stamp()


def start(parent):
    """What a process of its own would choose."""
    forget_stamp()
    return new_run(cli.parse_args(["--base", V1, "-t", "-n", "x", "-l", str(parent)]))


def test_runs_that_start_in_one_second_have_a_folder_each(tmp_path, one_second):
    folders = [start(tmp_path / "logs").folder for _ in range(3)]
    assert [folder.name for folder in folders] == [
        f"2026-01-02T03-04-05{n}_x" for n in ("", "_1", "_2")
    ]
    assert all(folder.is_dir() for folder in folders), "reserved when it is chosen"


def test_a_folder_that_another_makes_at_the_same_moment_is_not_taken(
    tmp_path, one_second, monkeypatch
):
    """Looking first whether it is there would not do: it is made between the look and the
    making.
    """
    made = []
    make = run._make_folder

    def make_after_another(folder):
        if not made:
            folder.mkdir(parents=True)
            made.append(folder)
        return make(folder)

    monkeypatch.setattr(run, "_make_folder", make_after_another)
    assert start(tmp_path / "logs").folder != made[0]


def test_processes_of_one_run_share_its_folder(tmp_path, one_second, monkeypatch):
    first = start(tmp_path)
    monkeypatch.setenv(run.STAMP_VARIABLE, first.stamp)  # as Lightning starts the others
    second = new_run(cli.parse_args(["--base", V1, "-t", "-n", "x", "-l", str(tmp_path)]))
    assert second.folder == first.folder and first.made and not second.made


def test_a_run_is_trained_by_one_command_at_a_time(tmp_path):
    with held(Run(tmp_path, "a")):
        with (
            pytest.raises(UserError, match="another process is training in it"),
            held(Run(tmp_path, "b")),
        ):
            pass
        if (
            worker := os.fork()
        ) == 0:  # a worker of the data, which the run's end may leave behind for seconds
            time.sleep(20)
            os._exit(0)
    try:
        with held(Run(tmp_path, "c")):
            pass
    finally:
        os.kill(worker, 9)
        os.waitpid(worker, 0)


@pytest.mark.parametrize(
    "error", [UserError("refused"), RuntimeError("broken"), signals.Interrupted(15)]
)
def test_a_start_that_makes_no_step_leaves_nothing(tmp_path, one_second, error):
    (tmp_path / "logs").mkdir()
    (before := tmp_path / "logs" / "before").touch()
    for parent, remaining in ((tmp_path / "new/logs", []), (tmp_path / "logs", [before])):
        started = start(parent)
        with pytest.raises(type(error)), held(started):
            (started.folder / "csv" / "a").mkdir(parents=True)
            (started.folder / "csv" / "a" / "metrics.csv").touch()
            raise error
        assert list(parent.glob("*")) == remaining and parent.exists() == bool(remaining)
    assert not (tmp_path / "new").exists()


def test_a_start_that_has_made_a_step_leaves_its_files(tmp_path, one_second):
    started = start(tmp_path)
    with pytest.raises(UserError), held(started):
        (started.folder / "log").touch()
        started.trained = True
        raise UserError("in step 2")
    assert (started.folder / "log").exists()


def test_a_config_that_was_refused_is_not_read_by_the_next_start(workspace, caplog):
    folder = workspace.train("refused-resume", "--max_steps", "1")
    before = sorted(path for path in folder.rglob("*"))
    assert (
        main.main(
            ["-r", str(folder), "--max_steps", "2", "model.params.cond_stage_trainable=false"]
        )
        == 1
    )
    assert "cond_stage_trainable" in caplog.text
    assert sorted(path for path in folder.rglob("*")) == before
    workspace.resume(folder, "--max_steps", "2")


@pytest.mark.parametrize("override", [
    "lightning.callbacks.image_logger={target: main.ImageLogger, params: {log_images_kwargs: "
    "{ddim_step: 2}}}",
    "lightning.callbacks.fixed={target: ldm.callbacks.fixed_loss.FixedLoss, params: {examples: 0}}",
    "model.params.scheduler_config={target: ldm.optim.schedules.WarmupDecay, params: "
    "{warmup_steps: 9}}",
    "model.params.optimizer=adamv",
    "model.base_learning_rate=0",
    "lightning.trainer.gradient_clip_algorithm=no",
])  # fmt: skip
def test_what_is_refused_is_refused_before_class_images_are_made(workspace, override):
    folder = workspace.path / "no-class-images"
    given = workspace.arguments("refused", "data.params.num_class_images=2", override)
    given[given.index("--reg_data_root") + 1] = str(folder)
    assert main.main(given) == 1
    assert not folder.exists()
    assert not list(workspace.logs.glob("*_refused"))
    shutil.rmtree(folder, ignore_errors=True)
