"""DreamBooth end to end: the training command, its run folder, its checkpoints, and going on with a
run.
"""

import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

import main
from ldm.data.personalized import PersonalizedBase
from ldm.errors import UserError
from ldm.training import summary
from tests.support import golden
from tests.support.processors import THREADS
from tests.support.runs import (
    SIZE,
    Workspace,
    checkpoint,
    config,
    csv_rows,
    golden_config,
    metrics,
    pictures,
    same,
)
from tests.support.starts import begin, run_to_end


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture(scope="module")
def finished(workspace):
    """A run of four steps that many tests look at."""
    return workspace.train("finished")


@pytest.fixture(autouse=True)
def logged(caplog):
    caplog.set_level("INFO")


def test_run_folder(finished):
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == [
        "epoch=000000-step=000000002.ckpt",
        "epoch=000000-step=000000004.ckpt",
        "last.ckpt",
    ]
    assert {path.name.split("-")[-1] for path in (finished / "configs").iterdir()} == {
        "project.yaml",
        "lightning.yaml",
    }
    assert (finished / "images").is_dir() and list(finished.glob("tensorboard/events*"))


def test_last_is_the_newest_checkpoint_at_no_cost_in_space(finished):
    last, newest = (
        finished / "checkpoints/last.ckpt",
        finished / "checkpoints/epoch=000000-step=000000004.ckpt",
    )
    assert last.samefile(newest)
    assert checkpoint(finished)["global_step"] == 4


def test_the_saved_config_is_the_one_that_ran(finished, workspace):
    saved = OmegaConf.merge(*[OmegaConf.load(path) for path in (finished / "configs").iterdir()])
    assert saved.data.params.train.params.data_root == str(workspace.photos)
    assert saved.data.params.reg.params.placeholder_token == "dog"
    assert saved.lightning.trainer.max_steps == 4
    assert checkpoint(finished)["config"] == OmegaConf.to_container(saved)


def test_checkpoints_have_compvis_keys(workspace):
    run = workspace.train("golden", "--max_steps", "1", base=golden_config(workspace.path))
    state = checkpoint(run)["state_dict"]
    assert list(state) == list(golden.latent_diffusion().state_dict())


def test_logged_losses(finished):
    rows = metrics(finished)
    assert [int(row["step"]) for row in rows] == [0, 1, 2, 3]
    for row in rows:
        subject, prior, total = (
            float(row[f"train/{key}"]) for key in ("loss", "loss_prior", "loss_total")
        )
        assert total == pytest.approx(subject + 1.0 * prior)
        assert float(row["train/loss_simple"]) == subject and float(row["train/loss_vlb"]) > 0


def test_what_trains_moves_and_what_does_not_stays(workspace, finished):
    first, last = (checkpoint(finished, name)["state_dict"] for name in
                   ("epoch=000000-step=000000002.ckpt", "last.ckpt"))  # fmt: skip
    moved = {key.split(".")[0] for key in first if not torch.equal(first[key], last[key])}
    assert moved == {"model", "cond_stage_model"}


def test_unet_only(workspace):
    run = workspace.train("unet-only", "model.params.cond_stage_trainable=false")
    first, last = (
        checkpoint(run, name) for name in ("epoch=000000-step=000000002.ckpt", "last.ckpt")
    )
    moved = {
        k.split(".")[0]
        for k in first["state_dict"]
        if not torch.equal(first["state_dict"][k], last["state_dict"][k])
    }
    assert moved == {"model"}


def test_reg_weight_scales_the_prior(workspace):
    (row, *_) = metrics(
        workspace.train("reg-weight", "model.params.reg_weight=0.25", "--max_steps", "1")
    )
    assert float(row["train/loss_total"]) == pytest.approx(
        float(row["train/loss"]) + 0.25 * float(row["train/loss_prior"])
    )


def test_training_without_a_prior(workspace):
    arguments = workspace.arguments("no-prior", "model.params.reg_weight=0", "--max_steps", "1")
    place = arguments.index("--reg_data_root")
    assert main.main(arguments[:place] + arguments[place + 2 :]) == 0
    (row,) = metrics(workspace.run("no-prior"))
    assert row["train/loss_total"] == row["train/loss"] and "train/loss_prior" not in row


def test_the_same_seed_gives_the_same_run(workspace, finished):
    again = workspace.train("again")
    assert same(checkpoint(again)["state_dict"], checkpoint(finished)["state_dict"])
    other = workspace.train("other-seed", "-s", "24")
    assert not same(checkpoint(other)["state_dict"], checkpoint(finished)["state_dict"])


def test_resume_from_a_checkpoint_inside_a_run(workspace, finished):
    resumed = workspace.train("rewound")
    workspace.resume(resumed / "checkpoints/epoch=000000-step=000000002.ckpt")
    assert same(checkpoint(resumed)["state_dict"], checkpoint(finished)["state_dict"])


def test_going_on_from_an_earlier_checkpoint_keeps_the_newest(workspace):
    run = workspace.train("kept", "--max_steps", "3")
    newest = checkpoint(run)["state_dict"]
    workspace.resume(run / "checkpoints/epoch=000000-step=000000002.ckpt", "--max_steps", "2")
    (kept,) = (run / "checkpoints").glob("last-of-*.ckpt")
    assert same(checkpoint(run, kept.name)["state_dict"], newest)


def test_two_runs_of_one_process_have_their_own_folders(workspace):
    first, second = (workspace.train(name, "--max_steps", "1") for name in ("one", "two"))
    assert main.main(workspace.arguments("one", "--max_steps", "1")) == 0
    assert len(list(workspace.logs.glob("photos*_one"))) == 2 and first != second


def test_a_resumed_run_does_not_make_class_images(workspace, caplog):
    run = workspace.train("prior-lost", "--max_steps", "1")
    assert main.main(["-r", str(run), "--max_steps", "2", "data.params.num_class_images=9"]) == 1
    assert "5 of 9 class images are missing" in caplog.text
    assert len(list(workspace.class_images.iterdir())) == 4


def test_resuming_a_finished_run_changes_nothing(workspace, finished):
    before = checkpoint(finished)["state_dict"]
    (
        leftover := finished / "checkpoints" / ".last.ckpt.1.tmp"
    ).touch()  # of a save that a kill ended
    workspace.resume(finished)
    assert same(checkpoint(finished)["state_dict"], before)
    assert not leftover.exists()


def test_actual_resume_takes_only_the_weights(workspace, finished, caplog):
    source = finished / "checkpoints/last.ckpt"
    run = workspace.train("from-weights", "--actual_resume", str(source), "--max_steps", "1")
    ours, theirs = checkpoint(run), checkpoint(finished)["state_dict"]
    assert ours["global_step"] == 1
    frozen = [key for key in theirs if key.startswith("first_stage_model")]
    assert frozen and all(torch.equal(ours["state_dict"][key], theirs[key]) for key in frozen)
    assert f"{source}: weights, 243 tensors (float32); 243 tensors used" in caplog.text


def test_init_word(workspace, finished):
    source = str(finished / "checkpoints/last.ckpt")
    run = workspace.train("init-word", "--actual_resume", source, "--init_word", "dog", "--max_steps", "1",
                          "model.base_learning_rate=1e-12")  # fmt: skip
    rows = checkpoint(run)["state_dict"][
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    ]
    sks, dog = 48136, 1929
    torch.testing.assert_close(rows[sks], rows[dog])


def test_scale_lr(workspace):
    run = workspace.train(
        "scaled",
        "--scale_lr",
        "--accumulate_grad_batches",
        "3",
        "data.params.batch_size=2",
        "--max_steps",
        "1",
    )
    (state,) = checkpoint(run)["optimizer_states"]
    assert state["param_groups"][0]["lr"] == pytest.approx(1e-3 * 3 * 1 * 2)


def test_image_logger_writes_grids(workspace):
    base = config(workspace.path)
    params = {
        "batch_frequency": 2,
        "max_images": 2,
        "increase_log_steps": False,
        "log_images_kwargs": {"ddim_steps": 2},
    }
    logger = {"image_logger": {"target": "main.ImageLogger", "params": params}}
    more = OmegaConf.create({"lightning": {"callbacks": logger}})
    OmegaConf.save(
        OmegaConf.merge(OmegaConf.load(base), more), base := workspace.path / "images.yaml"
    )
    run = workspace.train("images", base=base)
    names = sorted(path.name.split("_e-")[0] for path in (run / "images/train").iterdir())
    assert names == [
        f"{name}_gs-{step:06}"
        for name in ("inputs", "reconstruction", "samples")
        for step in (2, 4)
    ]


def test_the_model_makes_the_class_images_that_lack(workspace):
    folder = pictures(workspace.path / "few", 1)
    arguments = workspace.arguments(
        "class-images", "data.params.num_class_images=3", "--max_steps", "1"
    )
    arguments[arguments.index("--reg_data_root") + 1] = str(folder)
    assert main.main(arguments) == 0
    made = sorted(path.name for path in folder.iterdir())
    assert len(made) == 3 and "0.png" in made


def test_some_class_images_are_of_the_empty_prompt(workspace, caplog):
    """So that the prior holds the unconditional model, too."""
    folder = workspace.path / "unconditional"
    how = "{steps: 2, batch_size: 2, unconditional: 0.34}"
    more = ["data.params.num_class_images=6", f"data.params.class_images={how}", "--max_steps", "1"]
    arguments = workspace.arguments("unconditional", *more)
    arguments[arguments.index("--reg_data_root") + 1] = str(folder)
    assert main.main(arguments) == 0
    empty = {path.stem for path in folder.glob("*.txt") if path.read_text() == ""}
    assert len(list(folder.glob("*.png"))) == 6 and len(empty) == 2
    prior = PersonalizedBase(folder, size=32, reg=True)
    assert {path.stem for path in prior.paths if prior.captions[path] == [""]} == empty
    assert sorted(prior.prompts) == ["", "photo of a dog"]
    with pytest.raises(UserError, match="this caption is empty"):
        PersonalizedBase(folder, size=32)


def test_arguments_that_log_images_does_not_take(workspace, caplog):
    more = "lightning.callbacks.image_logger={target: main.ImageLogger, params: {log_images_kwargs: {ddim_step: 2}}}"
    assert main.main(workspace.arguments("mistyped-images", more)) == 1
    assert (
        "log_images_kwargs.ddim_step: unknown key" in caplog.text and "'ddim_steps'" in caplog.text
    )


def test_what_has_no_effect_is_said_once_a_run(workspace, caplog):
    workspace.train("without-effect", "--max_steps", "1")
    (line,) = [
        record.getMessage() for record in caplog.records if "without effect" in record.getMessage()
    ]
    assert "model_lr" in line and "personalization_config" in line and "scale_factor" not in line


def test_initial_weights_of_a_part_are_not_needed_again(workspace):
    (first_stage := workspace.path / "first_stage.ckpt").unlink(missing_ok=True)
    torch.save(
        {"state_dict": golden.latent_diffusion().first_stage_model.state_dict()}, first_stage
    )
    run = workspace.train(
        "parts-weights",
        "--max_steps",
        "1",
        f"model.params.first_stage_config.params.ckpt_path={first_stage}",
        base=golden_config(workspace.path),
    )
    first_stage.unlink()
    workspace.resume(run, "--max_steps", "2")
    assert checkpoint(run)["global_step"] == 2


def test_validation_and_the_best_checkpoint(workspace, caplog):
    base = OmegaConf.load(config(workspace.path))
    base.data.params.validation = {
        "target": "ldm.data.personalized.PersonalizedBase",
        "params": {"size": SIZE, "set": "val"},
    }
    OmegaConf.save(base, path := workspace.path / "validated.yaml")
    run = workspace.train("validated", "--val_check_interval", "2", "--max_steps", "5", base=path)
    measured = {}
    for row in csv_rows(run):
        if row.get("val/loss_simple_ema"):
            measured[int(row["step"]) + 1] = float(row["val/loss_simple_ema"])
    assert sorted(measured) == [2, 4]  # the epoch has six batches
    step = min(measured, key=measured.get)
    best = run / "checkpoints" / f"epoch=000000-step={step:09}.ckpt"
    assert f"{best} (val/loss_simple_ema {measured[step]:.4g})" in caplog.text


# Summaries


def test_the_summaries(workspace, caplog):
    run = workspace.train("summaries")
    text = caplog.text
    for part in (
        "UNet 0.18 M + text encoder 0.40 M; frozen: autoencoder 0.22 M",
        "3 images",
        "4 images",
        '"photo of a sks dog" = tokens 1125 539 320 48136 1929',
        "precision 32",
        "to 4 steps",
        "loss = subject + 1 x prior",
        str(run),
        "scripts/stable_txt2img.py --ckpt",
    ):
        assert part in text, part


def test_of_a_long_caption_the_beginning_is_said():
    text = "photo of a sks dog " + "in the snow " * 30
    said = summary.prompts([text], lambda words: list(range(len(words.split()))))
    beginning, tokens = said.split(" = tokens ")
    assert beginning.startswith('"photo of a sks dog in the snow') and beginning.endswith(
        'snow ..."'
    )
    assert len(beginning) < 100 and tokens == f"{' '.join(map(str, range(16)))} ... (95 in all)"


# Processes of their own


def wait_for(condition, process, log, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.is_alive(), log.read_text()[-3000:]
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.1)


def test_sigusr1_writes_a_checkpoint_and_ctrl_c_stops_with_one(workspace):
    seldom = "lightning.modelcheckpoint.params.every_n_train_steps=100000"
    arguments = workspace.arguments("signals", "--max_steps", "100000", seldom)
    process = begin(arguments, log := workspace.path / "log")
    try:
        wait_for(lambda: list(workspace.logs.glob("*_signals/csv/*/metrics.csv")), process, log)
        last = workspace.run("signals") / "checkpoints" / "last.ckpt"
        assert not last.exists()
        os.kill(process.pid, signal.SIGUSR1)
        wait_for(last.exists, process, log)
        saved = checkpoint(workspace.run("signals"))["global_step"]
        os.kill(process.pid, signal.SIGINT)
        process.join(60)
        assert process.exitcode == 130, log.read_text()[-3000:]
    finally:
        process.kill()
    done = checkpoint(workspace.run("signals"))["global_step"]
    assert done > saved
    workspace.resume(
        workspace.run("signals"), "--max_steps", str(done)
    )  # what was written can be gone on with


def test_one_command_starts_two_processes(workspace):
    """What they compute: tests/test_exactness.py."""
    devices = ["--accelerator", "cpu", "--devices", "2", "--strategy", "ddp", "--max_steps", "1"]
    arguments = workspace.arguments("ddp", *devices)
    run_to_end(arguments, log := workspace.path / "log-ddp", {"OMP_NUM_THREADS": THREADS})
    assert "x 2 processes" in log.read_text()
    assert checkpoint(workspace.run("ddp"))["global_step"] == 1, "one run folder for all ranks"


def test_the_end_of_a_run_without_its_clock_is_said():
    trainer = SimpleNamespace(global_step=3, max_steps=3)
    assert "trained  3 steps" in summary.end(trainer, None, None, None)
