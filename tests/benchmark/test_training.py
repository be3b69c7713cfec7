"""The benchmark measures training; how fast that is, no test asks."""

import importlib.util

import pytest
import torch

from ldm.benchmark.predict import predict
from ldm.benchmark.reference import TwoForward
from ldm.benchmark.variants import checked_config
from ldm.checkpoints.export import target_of
from ldm.config import load_config, to_plain
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.training import memory
from ldm.util import instantiate_from_config
from scripts import benchmark
from tests.support import runs
from tests.support.benchmarks import by_name, measured
from tests.support.runs import ROOT


def test_training_and_a_switch(here, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    switch = "kept activations: model.params.unet_config.params.use_checkpoint=false"
    found = measured(
        tmp_path,
        *[
            "train",
            "--base",
            runs.golden_config(tmp_path),
            "--steps",
            2,
            "--warmup",
            0,
            "--repeat",
            2,
            "--batch",
            2,
            "--device",
            "cpu",
        ],
        *["--switch", switch, "data.params.num_workers=0"],
    )
    ours, kept = found["variants"]
    assert (ours["name"], kept["name"]) == ("ours", "kept activations")
    assert len(ours["seconds"]) == 4 and ours["images"] == 4  # two rounds; two images of each half
    assert ours["images_per_second"] == pytest.approx(4 * ours["steps_per_second"])
    assert ours["flops"] > 1.1 * kept["flops"] > 0  # what is recomputed counts
    assert found["compared_to"] == "ours" and ours["speed_ratio"] == ours["memory_ratio"] == 1
    assert found["machine"]["matmul_flops_per_second"] == {"fp32": 1e12}
    assert ours["share_of_peak"] == pytest.approx(ours["flops_per_second"] / 1e12)
    assert found["given"]["overrides"] == ["data.params.num_workers=0"]
    printed = capsys.readouterr().out
    assert "| kept activations |" in printed and "speed, x ours" in printed
    assert sorted(p.name for p in tmp_path.iterdir()) == ["found.json", "micro.yaml"]


def test_the_memory_of_a_config(tmp_path, capsys):
    """The figures are those of the model that the config makes, and no weight of it is made for
    them.
    """
    config = runs.config(tmp_path)
    switch = "in backward: model.params.optimizer=adamw_in_backward"
    found = measured(tmp_path, "memory", "--base", config, "--switch", switch)["estimates"]
    with torch.device("meta"):
        model = instantiate_from_config(target_of(to_plain(load_config([config]))), "model")
    real = memory.estimate(model, "adamw", 2, runs.SIZE)
    assert found["ours"] == {**vars(real), "total": real.total}
    assert found["in backward"]["gradients"] == max(p.nbytes for p in model.parameters())
    assert f"| {real.total / 1e9:.2f} |" in capsys.readouterr().out


def test_memory_of_an_optimizer_that_there_is_not(tmp_path, capsys, caplog):
    config = runs.config(tmp_path, model__params__optimizer="adamw_in_backwards")
    assert benchmark.main(["memory", "--base", str(config)]) == 1
    assert (
        "model.params.optimizer: unknown 'adamw_in_backwards' (did you mean 'adamw_in_backward'?)"
        in caplog.text
    )


PROFILES = sorted((ROOT / "configs/stable-diffusion/profiles").glob("*gb.yaml"))


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_a_profile_fits_its_card(path):
    """Within what a card of that size has, with 0.8 GB for the driver and torch."""
    base = ROOT / "configs/stable-diffusion/v1-finetune_unfrozen.yaml"
    roots = [f"data.params.{name}.params.data_root=photos" for name in ("train", "reg")]
    config = checked_config([base, path], roots)
    gigabytes = int(path.stem.removesuffix("gb"))
    assert predict(config)[0][0].total < gigabytes * 2**30 - 0.8e9
    assert config["lightning"]["trainer"]["precision"] == "bf16-mixed"


def test_training_against_others(here, tmp_path):
    pytest.importorskip("diffusers")
    config = runs.config(tmp_path, lightning__trainer__accumulate_grad_batches=2)
    found = measured(
        tmp_path,
        *["train", "--base", config, "--steps", 1, "--warmup", 0, "--device", "cpu", "--size", 16],
        *["--against", "diffusers", "--against", "two-forward", "data.params.latent_cache=false"],
    )
    assert (
        list(by_name(found)) == ["diffusers", "two-forward", "ours"]
        and found["compared_to"] == "diffusers"
    )
    theirs, plain, ours = found["variants"]
    assert ours["images"] == theirs["images"] == plain["images"] == 4
    assert ours["speed_ratio"] == pytest.approx(
        ours["images_per_second"] / theirs["images_per_second"]
    )
    # The same work, but for how the text encoder recomputes and what a gradient is needed of.
    assert (
        ours["flops"]
        == pytest.approx(plain["flops"], rel=0.05)
        == pytest.approx(theirs["flops"], rel=0.1)
    )


def test_mixed_precision_on_both_sides(here, tmp_path):
    pytest.importorskip("diffusers")
    command = [
        "train",
        "--base",
        runs.config(tmp_path),
        "--steps",
        1,
        "--warmup",
        0,
        "--device",
        "cpu",
        "--size",
        16,
    ]
    found = measured(tmp_path, *command, "--precision", "bf16-mixed", *["--against", "diffusers"])
    assert [v["dtype"] for v in found["variants"]] == ["bf16", "bf16"]


def test_a_subject_without_a_prior(here, tmp_path):
    found = measured(
        tmp_path,
        *[
            "train",
            "--base",
            runs.config(tmp_path),
            "data.params.reg=null",
            "--steps",
            1,
            "--warmup",
            0,
        ],
        *["--device", "cpu", "--size", 16, "--against", "two-forward"],
    )
    assert [v["images"] for v in found["variants"]] == [1, 1]


@pytest.mark.parametrize(
    "failing, other, where",
    [
        ("two-forward", "ours", (TwoForward, "step")),
        ("ours", "two-forward", (LatentDiffusion, "training_step")),
    ],
)
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_what_does_not_fit_is_said_in_its_row(
    here, tmp_path, monkeypatch, capsys, failing, other, where, error
):
    def full(*_):
        raise error

    monkeypatch.setattr(*where, full)
    command = [
        "train",
        "--base",
        runs.config(tmp_path),
        "--steps",
        1,
        "--warmup",
        0,
        "--device",
        "cpu",
        "--size",
        16,
    ]
    found = by_name(measured(tmp_path, *command, "--against", "two-forward"))
    assert found[failing]["failed"] == "out of memory" and found[other]["seconds"]
    assert ("speed_ratio" in found[other]) is (failing == "ours"), "a ratio is to two-forward"
    assert "| out of memory |" in capsys.readouterr().out


@pytest.mark.parametrize(
    "more, message",
    [
        (["model.params.reg_wieght=2"], "model.params.reg_wieght: unknown key"),
        (["--switch", "x: model.params.reg_wieght=2"], "model.params.reg_wieght: unknown key"),
        (
            ["--switch", "reg_weight=2"],
            "--switch 'reg_weight=2': expected 'NAME: key.path=value ...'",
        ),
        (["--switch", "ours: model.params.reg_weight=2"], "'ours' is the name of two rows"),
        (["--steps", "0"], "--steps 0: expected at least 1"),
        (["--ckpt", "missing.ckpt"], "--ckpt missing.ckpt: no such file"),
        (["--against", "diffuser"], "invalid choice"),
        (["--against", "two-forward", "model.params.lora.rank=2"], "trains all weights"),
        (
            ["lightning.trainer.precision=64-true"],
            "lightning.trainer.precision: 64-true: measured are",
        ),
    ],
)
def test_what_cannot_be_measured(more, message, tmp_path, caplog, here):
    assert (
        benchmark.main(["train", "--base", str(runs.config(tmp_path)), "--device", "cpu", *more])
        == 1
    )
    (line,) = [record.getMessage() for record in caplog.records if "error" in record.getMessage()]
    assert message in line and "\n" not in line


@pytest.mark.parametrize("command", [["train", "--base"], ["sample", "--config"]])
def test_without_diffusers(command, tmp_path, caplog, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "diffusers" else found(name)
    )
    assert (
        benchmark.main(
            [*command, str(runs.config(tmp_path)), "--device", "cpu", "--against", "diffusers"]
        )
        == 1
    )
    assert [message for message in caplog.messages if message.startswith("error")] == [
        "error: --against diffusers: the package is not installed: pip install 'diffusers>=0.30'"
    ]
