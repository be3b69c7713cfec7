"""The training command line: what it understands, and what it refuses in one line."""

import argparse
import logging
from contextlib import nullcontext

import pytest

from ldm import host as devices
from ldm.commands import exit_status
from ldm.errors import UserError
from ldm.training import cli
from ldm.training.run import STAMP_VARIABLE, new_run, resumed_run

V1 = "configs/stable-diffusion/v1-finetune_unfrozen.yaml"
REFERENCE_COMMAND = [
    *[
        "--base",
        V1,
        "-t",
        "--actual_resume",
        "sd-v1-4-full-ema.ckpt",
        "-n",
        "my-dog",
        "--gpus",
        "0,",
    ],
    *["--data_root", "photos/", "--reg_data_root", "class_images/", "--class_word", "dog"],
]
NEW = ["--base", V1, "-t"]


@pytest.fixture(autouse=True)
def fresh_stamp(monkeypatch):
    monkeypatch.setenv(STAMP_VARIABLE, "2026-01-02T03-04-05")


def test_the_reference_command():
    args = cli.parse_args(REFERENCE_COMMAND)
    assert args.train is True and args.no_test is False
    assert (args.base, args.actual_resume, args.name, args.gpus) == (
        [V1],
        "sd-v1-4-full-ema.ckpt",
        "my-dog",
        "0,",
    )
    assert (args.data_root, args.reg_data_root, args.class_word) == (
        "photos/",
        "class_images/",
        "dog",
    )


def test_flags_reach_the_config():
    config, run = cli.prepare(cli.parse_args(REFERENCE_COMMAND))
    data = config.content["data"]["params"]
    assert [data[name]["params"]["data_root"] for name in ("train", "reg", "validation")] == [
        "photos/",
        "class_images/",
        "photos/",
    ]
    assert {
        data[name]["params"]["placeholder_token"] for name in ("train", "reg", "validation")
    } == {"dog"}
    assert config.seed == 23
    assert str(run.folder) == "logs/photos2026-01-02T03-04-05_my-dog"


@pytest.mark.parametrize(
    "flags, folder",
    [
        (["--data_root", "a/dog"], "logs/dog2026-01-02T03-04-05_v1-finetune_unfrozen"),
        (
            ["--data_root", "a/dog", "--datadir_in_name", "false"],
            "logs/2026-01-02T03-04-05_v1-finetune_unfrozen",
        ),
        (["-n", "x", "-f", "_lr1", "-l", "out"], "out/2026-01-02T03-04-05_x_lr1"),
        (["-n", "x", "-p", "project"], "project/2026-01-02T03-04-05_x"),
    ],
)
def test_run_folder_names(flags, folder):
    assert str(new_run(cli.parse_args(["--base", V1, "-t", *flags])).folder) == folder


@pytest.mark.parametrize("flags", [["-n", "../up"], ["-n", "a/b"], ["-f", "/lr1"]])
def test_a_name_that_says_another_folder_is_refused(flags):
    with pytest.raises(UserError, match=f"{flags[1]}: is a path; give a name without slashes"):
        new_run(cli.parse_args(["--base", V1, "-t", *flags]))


@pytest.mark.parametrize(
    "accelerator, flags, expected",
    [
        ("cpu", "fpu avx512f avx512_bf16 sse", "bf16-mixed"),
        ("auto", "amx_bf16", "bf16-mixed"),
        ("cpu", "fpu avx2 bf16x", "32-true"),
        ("mps", "avx512_bf16", "32-true"),
        ("gpu", "", "32-true"),  # there is none
    ],
)
def test_bfloat16_where_the_device_has_it(accelerator, flags, expected, tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(
        f"processor : 0\nflags\t: {flags}\n\nprocessor : 1\nflags : {flags}\n"
    )
    monkeypatch.setattr(devices, "CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(devices, "accelerators", lambda: ("cpu", 0))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert devices.default_precision(accelerator) == expected
    config, _ = cli.prepare(cli.parse_args(REFERENCE_COMMAND))
    assert config.trainer["precision"] == devices.default_precision("cpu")
    config, _ = cli.prepare(cli.parse_args([*REFERENCE_COMMAND, "--precision", "32-true"]))
    assert config.trainer["precision"] == "32-true"


@pytest.mark.parametrize(
    "flags, value", [([], None), (["--scale_lr"], True), (["--scale_lr", "False"], False)]
)
def test_scale_lr_is_an_optional_boolean(flags, value):
    assert cli.parse_args(["-t", *flags]).scale_lr is value


def test_overrides_are_not_taken_for_the_value_of_a_flag():
    args = cli.parse_args(
        ["--base", V1, "-t", "model.params.reg_weight=0.5", "data.params.batch_size=2"]
    )
    config, _ = cli.prepare(args)
    assert (
        config.get("model.params.reg_weight") == 0.5
        and config.content["data"]["params"]["batch_size"] == 2
    )


def test_several_bases_merge_in_their_order(tmp_path):
    """Behind one flag or behind several."""
    for name, value in (("a", 3), ("b", 4)):
        (tmp_path / f"{name}.yaml").write_text(
            f"model: {{params: {{reg_weight: {value}, {name}: 1}}}}"
        )
    a, b = str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")
    for flags in (
        ["--base", V1, a, b],
        ["--base", V1, "-b", a, "--base", b],
        ["-b", V1, "-b", a, "-t", "-b", b],
    ):
        config, _ = cli.prepare(cli.parse_args(["-t", *flags]))
        params = config.section("model.params")
        assert (params["reg_weight"], params["a"], params["b"], "unet_config" in params) == (
            4,
            1,
            1,
            True,
        )


def test_a_flag_that_is_given_twice_is_said(caplog):
    assert (
        cli.parse_args(["--data_root", "a", "--data_root=b", "--max_steps", "3"]).data_root == "b"
    )
    assert caplog.messages == ["--data_root is given 2 times: the last one counts"]


def test_the_value_of_a_flag_may_look_like_an_override():
    args = cli.parse_args(["--data_root", "photos.v2=final", "-t", "model.params.reg_weight=2"])
    assert args.data_root == "photos.v2=final" and args.overrides == ["model.params.reg_weight=2"]


def test_a_null_of_the_trainer_is_not_left_out():
    config, _ = cli.prepare(cli.parse_args([*NEW, "--max_epochs", "null"]))
    assert "max_epochs" in config.trainer and config.trainer["max_epochs"] is None


def test_trainer_arguments_are_flags():
    args = cli.parse_args(["--base", V1, "-t", "--max_steps", "7", "--precision=bf16-mixed"])
    config, _ = cli.prepare(args)
    trainer = config.trainer
    assert trainer["max_steps"] == 7 and trainer["precision"] == "bf16-mixed"
    assert trainer["accelerator"] == "cpu"  # no --gpus, nothing in the YAML


@pytest.mark.parametrize(
    "text, value",
    [
        ("7", 7),
        ("1e4", 10000),
        ("0.5", 0.5),
        ("true", True),
        ("10:00:00:00", "10:00:00:00"),
        ("bf16-mixed", "bf16-mixed"),
    ],
)
def test_values_of_trainer_flags(text, value):
    assert cli.trainer_value(text) == value and type(cli.trainer_value(text)) is type(value)


@pytest.mark.parametrize("flag", ["--actual_resume", "--init_word", "-n"])
def test_flags_of_a_new_run_do_not_go_with_resume(flag):
    with pytest.raises(UserError, match="not together with --resume"):
        cli.prepare(cli.parse_args(["-r", "run", flag, "x"]))


def test_no_class_images_are_needed_when_they_weigh_nothing():
    more = ["model.params.reg_weight=0.0", "data.params.num_class_images=200"]
    args = cli.parse_args(["--base", V1, "-t", "--data_root", "a", *more])
    assert not {"reg", "num_class_images"} & set(cli.prepare(args)[0].section("data.params"))


@pytest.mark.parametrize("debug", [False, True])
def test_ctrl_c(caplog, debug):
    """While it imports, say; a training that has begun writes a checkpoint first."""

    def command():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) if debug else nullcontext():
        assert exit_status(command, lambda: debug) == 130 and caplog.messages == ["interrupted"]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--data_rot", "x"], "unknown flag --data_rot (did you mean '--data_root'?)"),
        (["-t", "--max_step=3"], "unknown flag --max_step (did you mean '--max_steps'?)"),
        (["-t", "stray"], "expected true or false, got 'stray'"),
        (["-n", "a", "stray"], "'stray' is neither a flag nor key.path=value"),
        (["-t", "--max_steps", "[1"], "argument --max_steps: '[1' is not a YAML value"),
        (["-s", "many"], "invalid int value: 'many'"),
        (["--class_word", ""], "--class_word: is empty; give a value, or leave the flag out"),
        (["--actual_resume", ""], "--actual_resume: is empty"),
        (["-r", " "], "--resume: is empty"),
        (["--gpus", ""], "--gpus: is empty"),
        (["--max_steps", ""], "argument --max_steps: is empty"),
    ],
)
def test_what_does_not_parse(argv, message):
    with pytest.raises(UserError) as error:
        cli.parse_args(argv)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "nothing to do: give -t"),
        (["-t"], "no config: give one with --base"),
        (["-t", "--base", "no.yaml"], "no.yaml: no such config file"),
        (["-r", "no/run"], "--resume no/run: there is no such run folder"),
        (
            [*NEW, "--seed", "-1"],
            "run.seed .--seed.: expected a whole number from 0 to 4294967295, got -1",
        ),
        (
            [*NEW, "run.seed=4294967296"],
            "expected a whole number from 0 to 4294967295, got 4294967296",
        ),
        ([*NEW, "run.seed=1.5"], "expected a whole number from 0 to 4294967295, got 1.5"),
        (
            [*NEW, "run.scale_lr=maybe"],
            "run.scale_lr .--scale_lr.: expected true or false, got 'maybe'",
        ),
        ([*NEW, "run.export=fp8"], "run.export: unknown 'fp8'; accepted: fp32, fp16, bf16"),
        (
            [*NEW, "--max_steps", "0"],
            "lightning.trainer.max_steps: expected a whole number, 1 or more, or -1 .* got 0",
        ),
        ([*NEW, "--max_steps", "-5"], "lightning.trainer.max_steps: .* got -5"),
        ([*NEW, "--max_steps", "1.5"], "lightning.trainer.max_steps: .* got 1.5"),
        ([*NEW, "--max_steps", "many"], "lightning.trainer.max_steps: .* got 'many'"),
        ([*NEW, "--max_epochs", "0"], "lightning.trainer.max_epochs: .* got 0"),
        ([*NEW, "--limit_train_batches", "0"], "lightning.trainer.limit_train_batches: .* got 0"),
        (
            [*NEW, "--accumulate_grad_batches", "0"],
            "accumulate_grad_batches: .* 1 or more, got 0",
        ),
        ([*NEW, "--log_every_n_steps", "-1"], "lightning.trainer.log_every_n_steps: .* got -1"),
        (
            [*NEW, "--gradient_clip_val", "-1"],
            "lightning.trainer.gradient_clip_val: expected a number, 0 or more",
        ),
        (
            [*NEW, "--deterministic", "perhaps"],
            "lightning.trainer.deterministic: expected true, false or warn",
        ),
        ([*NEW, "--benchmark", "perhaps"], "lightning.trainer.benchmark: expected true or false"),
        ([*NEW, "-n", "x" * 200], "whose name has 223 bytes, of 215 that it may have"),
        ([*NEW, "-n", "ä" * 120], "whose name has 263 bytes"),
    ],
)
def test_what_cannot_be_prepared(argv, message):
    with pytest.raises(UserError, match=message):
        cli.prepare(cli.parse_args(argv))


@pytest.mark.parametrize("flag", ["--actual_resume", "--embedding_manager_ckpt"])
def test_missing_files_to_start_from(flag):
    with pytest.raises(UserError, match=f"{flag} no.ckpt: no such file"):
        cli.start_of(cli.parse_args(["-t", flag, "no.ckpt"]))


def test_resume_needs_a_checkpoint_and_a_config(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match=r"no checkpoint .*last.ckpt"):
        resumed_run(str(tmp_path))
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    with pytest.raises(UserError, match="no configs in"):
        resumed_run(str(tmp_path))
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "a-project.yaml").touch()
    assert resumed_run(str(tmp_path)).resume_from == tmp_path / "checkpoints" / "last.ckpt"
    by_file = resumed_run(str(tmp_path / "checkpoints" / "last.ckpt"))
    assert by_file.folder == tmp_path.resolve()


# --gpus


@pytest.mark.parametrize(
    "text, indices",
    [("0,", [0]), ("1", [0]), ("0,1", [0, 1]), ("0,1,", [0, 1]), ("1,", [1]), ("2", [0, 1])],
)
def test_gpus_on_a_machine_with_two(monkeypatch, caplog, text, indices):
    monkeypatch.setattr(devices, "accelerators", lambda: ("gpu", 2))
    with caplog.at_level(logging.INFO):
        assert devices.parse_gpus(text) == {"accelerator": "gpu", "devices": indices}
    assert f"--gpus {text}: training on gpu" in caplog.text


def test_gpus_0_is_the_cpu(monkeypatch, caplog):
    monkeypatch.setattr(devices, "accelerators", lambda: ("gpu", 2))
    with caplog.at_level(logging.INFO):
        assert devices.parse_gpus("0")["accelerator"] == "cpu"
    assert "write '0,'" in caplog.text


@pytest.mark.parametrize("text", ["0,", "1"])
def test_the_first_gpu_falls_back_to_the_cpu(monkeypatch, caplog, text):
    monkeypatch.setattr(devices, "accelerators", lambda: ("cpu", 0))
    assert devices.parse_gpus(text)["accelerator"] == "cpu"
    assert "has no GPU" in caplog.text


@pytest.mark.parametrize("text, there", [("7,", 0), ("2,", 2), ("0,1", 0), ("3", 2)])
def test_gpus_that_are_not_there(monkeypatch, text, there):
    monkeypatch.setattr(devices, "accelerators", lambda: ("gpu" if there else "cpu", there))
    with pytest.raises(UserError, match=f"--gpus {text}: there is no GPU"):
        devices.parse_gpus(text)


@pytest.mark.parametrize("text", ["cuda", "", "0;1", "-1"])
def test_gpus_that_do_not_parse(text):
    with pytest.raises(UserError, match="expected a list"):
        devices.parse_gpus(text)


def test_str2bool():
    assert [cli.str2bool(text) for text in ("yes", "True", "0", "no")] == [True, True, False, False]
    with pytest.raises(argparse.ArgumentTypeError):
        cli.str2bool("maybe")
