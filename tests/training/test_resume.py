"""A run that goes on: the config's settings hold, the checkpoint's progress is kept, the rest is
refused or shown.
"""

import logging
import os
import re
import shutil

import pytest
import torch
from omegaconf import OmegaConf

import main
from ldm.config import RunConfig
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.training.saved import with_files_found
from tests.support import runs
from tests.support.runs import checkpoint, metrics, same

DECAY = ["model.params.scheduler_config.target=ldm.optim.schedules.WarmupDecay"]
RATE = 1e-3  # of `runs.config`


class Other(LatentDiffusion):
    """Another model with the same params."""


@pytest.fixture(autouse=True)
def say_all(caplog):
    caplog.set_level(logging.INFO)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return runs.Workspace(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def finished(workspace):
    """A run of 2 steps whose rate falls to 0 at its end."""
    return workspace.train("finished", "--max_steps", "2", *DECAY)


@pytest.fixture
def run(finished, workspace, tmp_path):
    """A copy of that run: a test may go on with it."""
    return shutil.copytree(finished, tmp_path / "copy")


def rates(run):
    """The rates of the next step, and those of the steps that were done, as logged."""
    (optimizer,) = checkpoint(run)["optimizer_states"]
    logged = [float(row["lr-AdamW"]) for row in runs.csv_rows(run) if row.get("lr-AdamW")]
    return [group["lr"] for group in optimizer["param_groups"]], logged


def refused(caplog, *arguments):
    """The error of a command."""
    caplog.clear()
    assert main.main(list(arguments)) == 1
    (error,) = [message for message in caplog.messages if message.startswith("error: ")]
    return error


def test_more_steps_are_steps_of_the_schedule_of_now(run, workspace, caplog):
    assert rates(run) == ([0.0], [RATE, RATE / 2])
    workspace.resume(run, "--max_steps", "4")
    assert rates(run) == ([0.0], [RATE, RATE / 2, RATE / 2, RATE / 4])
    assert (
        "linear from step 0 down to 0 x at step 4" in caplog.text
        and "going on from step 2" in caplog.text
    )
    assert "lightning.trainer.max_steps 2 -> 4" in caplog.text


def test_a_schedules_own_steps_hold_in_the_middle_of_a_run(run, workspace):
    workspace.resume(run, "--max_steps", "3", "model.params.scheduler_config.params.steps=8")
    assert rates(run)[1][2:] == [RATE * 6 / 8]


def test_a_given_rate_is_the_rate(run, workspace, caplog):
    workspace.resume(run, "--max_steps", "4", "model.base_learning_rate=5e-6")
    assert rates(run)[1][2:] == [5e-6 / 2, 5e-6 / 4]
    assert (
        "learning rate 5e-06" in caplog.text
        and "model.base_learning_rate 0.001 -> 5e-06" in caplog.text
    )


def test_a_schedule_comes_or_goes_where_the_run_stands(run, workspace):
    workspace.resume(run, "--max_steps", "3", "model.params.scheduler_config=null")
    assert rates(run) == ([RATE], [RATE, RATE / 2, RATE])
    workspace.resume(
        run, "--max_steps", "4", *DECAY, "model.params.scheduler_config.params.steps=4"
    )
    assert rates(run)[1][3:] == [RATE / 4]


def test_the_text_encoders_rate_is_the_given_one(workspace):
    run = workspace.train("text", "--max_steps", "1", "model.params.text_encoder_lr=1e-4")
    workspace.resume(run, "--max_steps", "2", "model.params.text_encoder_lr=3e-5")
    assert rates(run)[0] == [RATE, 3e-5]


def test_without_a_change_nothing_changes(workspace):
    """Bit for bit that of a run that was not interrupted, with the last rate not 0."""
    straight = workspace.train(
        "straight", "--max_steps", "3", *DECAY, "model.params.scheduler_config.params.steps=9"
    )
    first = workspace.train(
        "first", "--max_steps", "1", *DECAY, "model.params.scheduler_config.params.steps=9"
    )
    workspace.resume(first, "--max_steps", "3")
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert same(checkpoint(first)[part], checkpoint(straight)[part]), part
    assert [row["train/loss_total"] for row in metrics(first)] == [
        row["train/loss_total"] for row in metrics(straight)
    ]


def test_the_averages_decay_is_the_given_one(workspace):
    run = workspace.train(
        "averaged", "--max_steps", "1", "model.params.use_ema=true", "model.params.ema_decay=0.9"
    )
    workspace.resume(run, "--max_steps", "2", "model.params.ema_decay=0.5")
    state = checkpoint(run)["state_dict"]
    assert float(state["model_ema.decay"]) == 0.5 and int(state["model_ema.num_updates"]) == 2


def test_a_callbacks_argument_is_the_given_one(run, workspace):
    stopping = ["lightning.callbacks.stop.target=pytorch_lightning.callbacks.EarlyStopping"]
    stopping += [
        "lightning.callbacks.stop.params.monitor=train/loss",
        "lightning.callbacks.stop.params.patience=3",
    ]
    workspace.resume(run, "--max_steps", "6", *stopping)
    workspace.resume(run, "--max_steps", "7", "lightning.callbacks.stop.params.patience=5")
    states = checkpoint(run)["callbacks"]
    (state,) = [value for name, value in states.items() if name.startswith("EarlyStopping")]
    assert state["patience"] == 5


def said(caplog, title, row):
    """The text of a row of the last screen with this title; "" where it has none."""
    *_, screen = (message for message in caplog.messages if message.startswith(f"{title}\n"))
    rows = [line.strip() for line in screen.splitlines()]
    return next((line.partition("  ")[2].strip() for line in rows if line.startswith(row)), "")


def test_a_finished_run_says_that_no_step_is_left(run, workspace, caplog):
    workspace.resume(run)
    assert "none is left: --max_steps with a larger number" in said(caplog, "Training", "steps")
    workspace.resume(run, "--max_steps", "3")
    assert "none is left" not in said(caplog, "Training", "steps")


@pytest.mark.parametrize("limit, value", [("max_time", "00:00:00:00"), ("max_epochs", "1")])
def test_a_run_that_a_limit_ends_says_so_and_goes_on(run, workspace, caplog, limit, value):
    setting = f"lightning.trainer.{limit}"
    workspace.resume(run, "--max_steps", "8", f"{setting}={value}")
    done = checkpoint(run)["global_step"]
    assert done < 8
    assert said(caplog, "Done", "trained").startswith(f"{done} of 8 steps: {setting} is reached")
    *_, folder, override = said(caplog, "Done", "go on").split()
    workspace.resume(folder, "--max_steps", "9", override)
    assert checkpoint(run)["global_step"] == 9
    assert re.fullmatch(r"(start|latents) .* steps [\d.]+ s", said(caplog, "Done", "time"))
    assert said(caplog, "Done", "trained").startswith("9 steps") and not said(
        caplog, "Done", "go on"
    )


def test_what_an_earlier_command_changed_is_shown(run, workspace, caplog):
    workspace.resume(run, "--max_steps", "3", "lightning.callbacks.first_step=null")
    assert "lightning.callbacks.first_step as by default -> null" in caplog.text
    caplog.clear()
    workspace.resume(run, "--max_steps", "4")
    (summary,) = [message for message in caplog.messages if message.startswith("Training\n")]
    (before,) = [line for line in summary.splitlines() if line.strip().startswith("changed before")]
    assert (
        "lightning.callbacks.first_step as by default -> null" in before
        and "max_steps" not in before
    )
    caplog.clear()
    workspace.resume(
        run,
        "--max_steps",
        "6",
        "lightning.callbacks.first_step={}",
        "model.base_learning_rate=1e-3",
    )
    assert (
        "what should train has moved, and nothing else has" in caplog.text
    )  # the check is on again


@pytest.mark.parametrize("change, message", [
    ("model.params.linear_end=0.02", "model.params.linear_end: 0.012 in the run, now 0.02: the "
                                     "noise schedule is part"),
    ("model.params.timesteps=500", "model.params.timesteps: 1000 in the run, now 500: the noise "
                                   "schedule is part"),
    ("model.params.use_ema=true", "model.params.use_ema: False in the run, now True"),
    ("model.params.cond_stage_trainable=false", "model.params.cond_stage_trainable: True in the "
                                                "run, now False"),
    ("model.params.freeze=[model.*]", "model.params.freeze: None in the run, now ['model.*']"),
    ("model.params.lora.rank=4", "model.params.lora: None in the run, now {'rank': 4}: the "
                                 "adapters are part"),
    ("model.params.text_encoder_lr=1e-4", "model.params.text_encoder_lr: None in the run, "
                                          "now 0.0001"),
    ("model.params.optimizer=muon", "model.params.optimizer: adamw in the run, now muon: it "
                                    "cannot go on from"),
    (f"model.target={__name__}.Other", "model.target: ldm.models.diffusion.ddpm.LatentDiffusion in "
                                       "the run, now"),
    ("lightning.trainer.max_steps=1", "lightning.trainer.max_steps: 1, but the run has done "
                                      "2 steps"),
])  # fmt: skip
def test_what_cannot_change_is_refused_by_name_and_leaves_no_trace(
    finished, caplog, change, message
):
    before = sorted(finished.rglob("*"))
    error = refused(caplog, "-r", str(finished), change)
    assert message in error and "\n" not in error
    assert sorted(finished.rglob("*")) == before


@pytest.mark.parametrize(
    "flags", [["--logdir", "x"], ["--datadir_in_name", "false"], ["--actual_resume", "x.ckpt"]]
)
def test_flags_of_a_new_run_are_refused(finished, caplog, flags):
    assert f"error: {flags[0]}: not together with --resume" in refused(
        caplog, "-r", str(finished), *flags
    )


def test_weights_alone_are_no_run(run, caplog):
    path = run / "checkpoints" / "last.ckpt"
    content = {key: value for key, value in checkpoint(run).items() if key != "optimizer_states"}
    path.unlink()  # a second name of the checkpoint beside it
    torch.save(content, path)
    assert "has weights alone" in refused(caplog, "-r", str(run))


# Places


def test_a_run_goes_on_from_another_folder_and_after_it_was_moved(tmp_path, monkeypatch):
    (home := tmp_path / "home").mkdir()
    monkeypatch.chdir(home)
    workspace = runs.Workspace(home)
    arguments = workspace.arguments("moved", "--max_steps", "1")
    assert (
        main.main(
            [os.path.relpath(word) if word.startswith(str(home)) else word for word in arguments]
        )
        == 0
    )
    run = workspace.run("moved").relative_to(home)
    # The whole workspace is renamed: what was relative to it still is.
    home = home.rename(tmp_path / "new_home")
    monkeypatch.chdir(home)
    workspace.resume(run, "--max_steps", "2")
    # The run alone is moved, and the command given in a third folder.
    moved = (home / run).rename(tmp_path / "elsewhere.v2")
    monkeypatch.chdir(tmp_path)
    workspace.resume(moved, "--max_steps", "3")
    assert checkpoint(moved)["global_step"] == 3 and not list(home.glob("logs/*"))


def test_the_folders_of_each_subject_are_found_again(tmp_path, monkeypatch):
    for name in ("photos", "class"):
        (tmp_path / "moved" / name).mkdir(parents=True)
    concepts = [{"data_root": "photos", "reg_data_root": "class", "class_word": "photos"}]
    config = RunConfig({"data": {"params": {"concepts": concepts}}})
    monkeypatch.chdir(tmp_path)
    (found,) = with_files_found(config, tmp_path / "moved/logs/run").concepts
    assert found == {
        "data_root": str(tmp_path / "moved/photos"),
        "reg_data_root": str(tmp_path / "moved/class"),
        "class_word": "photos",
    }


def test_names_that_look_like_something_else(tmp_path, monkeypatch):
    """Interpolations, overrides and backslashes are taken as they are, and come back from the saved
    config.
    """
    workspace = runs.Workspace(tmp_path)
    photos = workspace.photos.rename(tmp_path / "photos.v2=${final}\\${x}")
    arguments = workspace.arguments("a${b}", "--max_steps", "1")
    arguments[arguments.index("--data_root") + 1] = str(photos)
    assert main.main(arguments) == 0
    (run,) = workspace.logs.iterdir()
    assert run.name.endswith("_a${b}") and run.name.startswith(photos.name)
    workspace.resume(run, "--max_steps", "2")
    (saved, *_) = sorted(run.glob("configs/*-project.yaml"))
    params = OmegaConf.to_container(OmegaConf.load(saved), resolve=True)["data"]["params"]["train"][
        "params"
    ]
    assert params["data_root"] == str(photos)


# Runs of older code


def name_old_targets(value):
    """Nested containers that name targets as runs before the moves did."""
    if isinstance(value, dict):
        return {key: name_old_targets(inner) for key, inner in value.items()}
    return (
        value.replace("ldm.optim.schedules.", "ldm.lr_scheduler.")
        if isinstance(value, str)
        else value
    )


def test_a_run_that_names_old_targets_goes_on(run, workspace, caplog):
    for path in run.glob("configs/*.yaml"):
        path.write_text(path.read_text().replace("ldm.optim.schedules.", "ldm.lr_scheduler."))
    content = checkpoint(run)
    content["config"] = name_old_targets(content["config"])
    last = run / "checkpoints" / "last.ckpt"
    last.unlink()
    torch.save(content, last)
    assert "ldm.lr_scheduler.WarmupDecay" in (next(run.glob("configs/*-project.yaml"))).read_text()
    workspace.resume(run, "--max_steps", "3")
    assert checkpoint(run)["global_step"] == 3
    target = "model.params.scheduler_config.target=ldm.lr_scheduler.Lost"
    assert "unknown target 'ldm.lr_scheduler.Lost'" in refused(
        caplog, "-r", str(run), "--max_steps", "4", target
    )
