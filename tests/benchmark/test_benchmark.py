"""The benchmark measures what it says; how fast that is, no test asks."""

import importlib.util
import json
import os
from importlib.metadata import version

import pytest
import torch
from einops import rearrange

from ldm import host
from ldm.benchmark import clock, isolation, machine, report, rows
from ldm.benchmark.predict import predict
from ldm.benchmark.reference import DiffusersDreamBooth, TwoForward
from ldm.benchmark.train import Settings
from ldm.benchmark.variants import checked_config, parse_switch, training_rows, variants
from ldm.checkpoints.diffusers_format import to_diffusers
from ldm.checkpoints.export import target_of
from ldm.config import load_config, load_yaml, to_plain
from ldm.errors import UserError
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.rng import SampleRandom
from ldm.training import memory
from ldm.util import instantiate_from_config
from scripts import benchmark
from tests.support import golden, runs
from tests.support.runs import ROOT


@pytest.fixture
def here(monkeypatch):
    """Measurements in this process: the importing takes a fresh one longer than the measuring."""
    monkeypatch.setattr(rows, "apart", lambda function, *arguments, environment=None: function(*arguments))
    monkeypatch.setattr(rows, "matmul_rate", lambda device, dtype, threads, clock: 1e12)


def measured(tmp_path, *command):
    """What the command wrote as JSON."""
    assert benchmark.main([*map(str, command), "--json", str(tmp_path / "found.json")]) == 0
    return json.loads((tmp_path / "found.json").read_text())


def by_name(found):
    return {variant["name"]: variant for variant in found["variants"]}


# Loading


@pytest.mark.parametrize("purpose", ["sample", "train"])
def test_loading(purpose, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = runs.config(tmp_path)
    command = ["load", "--config", str(config), "--for", purpose, "--json", str(tmp_path / "load.json")]
    assert benchmark.main(command) == 0
    found = json.loads((tmp_path / "load.json").read_text())
    assert found["seconds"] > 0 and found["peak_bytes"] > 0 and found["for"] == purpose
    assert found["weights"] == pytest.approx(found["file_bytes"], rel=0.02)
    assert found["machine"]["torch"] == version("torch")
    assert f"to {purpose} in fp32" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["load.json", "micro.yaml"]


def test_half_precision_is_not_for_training(caplog):
    assert benchmark.main(["load", "--for", "train", "--dtype", "fp16"]) == 1
    assert "weights are trained in fp32" in caplog.text


# Training


def test_training_and_a_switch(here, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    switch = "kept activations: model.params.unet_config.params.use_checkpoint=false"
    found = measured(
        tmp_path,
        *[
            "train",
            "--base",
            runs.config(tmp_path),
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
    """The figures are those of the model that the config makes, and no weight of it is made for them."""
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
    assert "model.params.optimizer: unknown 'adamw_in_backwards' (did you mean 'adamw_in_backward'?)" in caplog.text


PROFILES = sorted((ROOT / "configs/stable-diffusion/profiles").glob("*.yaml"))


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_a_profile_fits_its_card(path):
    """Within what a card of that size has, with 0.8 GB for the driver and torch."""
    base = ROOT / "configs/stable-diffusion/v1-finetune_unfrozen.yaml"
    roots = [f"data.params.{name}.params.data_root=photos" for name in ("train", "reg")]
    config = checked_config([base, path], roots)
    gigabytes = int(path.stem.removesuffix("gb"))
    assert predict(config).total < gigabytes * 2**30 - 0.8e9
    assert config["lightning"]["trainer"]["precision"] == "bf16-mixed"


def test_training_against_others(here, tmp_path):
    pytest.importorskip("diffusers")
    config = runs.config(tmp_path, lightning__trainer__accumulate_grad_batches=2)
    found = measured(
        tmp_path,
        *["train", "--base", config, "--steps", 1, "--warmup", 0, "--device", "cpu", "--size", 16],
        *["--against", "diffusers", "--against", "two-forward"],
    )
    assert list(by_name(found)) == ["diffusers", "two-forward", "ours"] and found["compared_to"] == "diffusers"
    theirs, plain, ours = found["variants"]
    assert ours["images"] == theirs["images"] == plain["images"] == 4
    assert ours["speed_ratio"] == pytest.approx(ours["images_per_second"] / theirs["images_per_second"])
    # The same work, but for how the text encoder recomputes and what a gradient is needed of.
    assert ours["flops"] == pytest.approx(plain["flops"], rel=0.05) == pytest.approx(theirs["flops"], rel=0.1)


def test_mixed_precision_on_both_sides(here, tmp_path):
    pytest.importorskip("diffusers")
    command = ["train", "--base", runs.config(tmp_path), "--steps", 1, "--warmup", 0, "--device", "cpu", "--size", 16]
    found = measured(tmp_path, *command, "--precision", "bf16-mixed", *["--against", "diffusers"])
    assert [v["dtype"] for v in found["variants"]] == ["bf16", "bf16"]


def test_a_subject_without_a_prior(here, tmp_path):
    found = measured(
        tmp_path,
        *["train", "--base", runs.config(tmp_path), "data.params.reg=null", "--steps", 1, "--warmup", 0],
        *["--device", "cpu", "--size", 16, "--against", "two-forward"],
    )
    assert [v["images"] for v in found["variants"]] == [1, 1]


@pytest.mark.parametrize(
    "failing, other, where",
    [("two-forward", "ours", (TwoForward, "step")), ("ours", "two-forward", (LatentDiffusion, "training_step"))],
)
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_what_does_not_fit_is_said_in_its_row(here, tmp_path, monkeypatch, capsys, failing, other, where, error):
    def full(*_):
        raise error

    monkeypatch.setattr(*where, full)
    command = ["train", "--base", runs.config(tmp_path), "--steps", 1, "--warmup", 0, "--device", "cpu", "--size", 16]
    found = by_name(measured(tmp_path, *command, "--against", "two-forward"))
    assert found[failing]["failed"] == "out of memory" and found[other]["seconds"]
    assert ("speed_ratio" in found[other]) is (failing == "ours"), "a ratio is to two-forward"
    assert "| out of memory |" in capsys.readouterr().out


@pytest.mark.parametrize(
    "more, message",
    [
        (["model.params.reg_wieght=2"], "model.params.reg_wieght: unknown key"),
        (["--switch", "x: model.params.reg_wieght=2"], "model.params.reg_wieght: unknown key"),
        (["--switch", "reg_weight=2"], "--switch 'reg_weight=2': expected 'NAME: key.path=value ...'"),
        (["--switch", "ours: model.params.reg_weight=2"], "'ours' is the name of two rows"),
        (["--steps", "0"], "--steps 0: expected at least 1"),
        (["--ckpt", "missing.ckpt"], "--ckpt missing.ckpt: no such file"),
        (["--against", "diffuser"], "invalid choice"),
        (["--against", "two-forward", "model.params.lora.rank=2"], "trains all weights"),
        (["lightning.trainer.precision=64-true"], "lightning.trainer.precision: 64-true: measured are"),
    ],
)
def test_what_cannot_be_measured(more, message, tmp_path, caplog, here):
    assert benchmark.main(["train", "--base", str(runs.config(tmp_path)), "--device", "cpu", *more]) == 1
    (line,) = [record.getMessage() for record in caplog.records if "error" in record.getMessage()]
    assert message in line and "\n" not in line


@pytest.mark.parametrize("command", [["train", "--base"], ["sample", "--config"]])
def test_without_diffusers(command, tmp_path, caplog, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "diffusers" else found(name))
    assert benchmark.main([*command, str(runs.config(tmp_path)), "--device", "cpu", "--against", "diffusers"]) == 1
    assert caplog.messages == [
        "error: --against diffusers: the package is not installed: pip install 'diffusers>=0.30'"
    ]


# The references compute our loss


def shared_step_loss(model, images, captions, count, seeds=None):
    """Ours, of images whose first `count` are the subject's."""
    images = rearrange(images, "b c h w -> b h w c")
    halves = [
        {"image": images[part], "caption": captions[part], **({} if seeds is None else {"noise_seed": seeds[part]})}
        for part in (slice(None, count), slice(count, None))
    ]
    return model.shared_step(halves, "train")[0]


def test_the_diffusers_step_has_our_loss(tmp_path):
    pytest.importorskip("diffusers")
    base = runs.config(tmp_path, data__params__batch_size=2, model__params__reg_weight=0.5)
    config = checked_config([base], ["data.params.train.params.size=16"])
    ours = LatentDiffusion(**config["model"]["params"])
    golden.load_golden_weights(ours)
    theirs = DiffusersDreamBooth(config, torch.device("cpu"))
    for name, state in to_diffusers(ours.state_dict()).items():
        network = {"unet": theirs.unet, "vae": theirs.vae, "text_encoder": theirs.text_encoder}[name]
        known = network.state_dict()
        network.load_state_dict({key if key in known else key.removeprefix("text_model."): state[key] for key in state})

    captions = ["photo of a sks dog"] * 2 + ["photo of a dog"] * 2
    assert torch.equal(theirs.tokens, ours.cond_stage_model.tokenize(captions))
    seeds = torch.arange(4)
    random = SampleRandom(seeds)
    eps, t, noise = random.randn((4, 4, 8, 8)), random.randint(1000, 4), random.randn((4, 4, 8, 8))
    posterior = theirs.vae.encode(theirs.images).latent_dist
    latents = (posterior.mean + posterior.std * eps) * theirs.vae.config.scaling_factor
    expected = shared_step_loss(ours, theirs.images, captions, 2, seeds)
    found = theirs.loss(latents, theirs.tokens, noise, t)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_diffusers_step_trains_unet_and_text_encoder(tmp_path):
    pytest.importorskip("diffusers")
    config = checked_config([runs.config(tmp_path)], ["data.params.train.params.size=16"])
    theirs = DiffusersDreamBooth(config, torch.device("cpu"))
    networks = {"unet": theirs.unet, "vae": theirs.vae, "text_encoder": theirs.text_encoder}
    before = {name: [p.detach().clone() for p in network.parameters()] for name, network in networks.items()}
    theirs.step()
    changed = {
        name for name, n in networks.items() if any(not torch.equal(a, b) for a, b in zip(before[name], n.parameters()))
    }
    assert changed == {"unet", "text_encoder"}
    assert theirs.unet.is_gradient_checkpointing and all(p.grad is None for p in theirs.trained)


def test_two_passes_have_our_loss(tmp_path):
    base = runs.config(tmp_path, data__params__batch_size=2, model__params__reg_weight=0.5)
    plain = TwoForward(checked_config([base], ["data.params.train.params.size=16"]), torch.device("cpu"))
    golden.load_golden_weights(plain.model)
    (images, captions), (prior_images, prior_captions) = plain.halves
    torch.manual_seed(5)
    found = plain.loss()
    torch.manual_seed(5)
    together = torch.cat([images, prior_images])
    expected = shared_step_loss(plain.model, together, captions + prior_captions, 2)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


# Sampling


def test_sampling_against_diffusers(here, tmp_path, capsys, monkeypatch):
    pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    command = ["sample", "--config", runs.config(tmp_path), "--steps", 3, "--batch", 2, "--device", "cpu"]
    found = measured(tmp_path, *command, "--size", 32, "--against", "diffusers")
    theirs, ours = found["variants"]
    assert (theirs["name"], ours["name"], found["compared_to"]) == ("diffusers", "ours", "diffusers")
    assert ours["images"] == 2 and ours["images_per_second"] == pytest.approx(2 / ours["seconds"][0])
    assert 0 < ours["step_seconds"][0] < ours["seconds"][0] / 3
    assert ours["flops"] == pytest.approx(theirs["flops"], rel=0.05)  # the same networks as often
    assert "| ours" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["found.json", "micro.yaml"]


def test_sampling_in_bf16(here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["sample", "--config", runs.config(tmp_path), "--steps", 2, "--batch", 1, "--device", "cpu"]
    (ours,) = measured(tmp_path, *command, "--size", 32, "--dtype", "bf16")["variants"]
    assert ours["dtype"] == "bf16" and ours["seconds"][0] > 0


def test_sampling_in_fp16_wants_a_gpu(tmp_path, caplog):
    assert benchmark.main(["sample", "--config", str(runs.config(tmp_path)), "--device", "cpu", "--dtype", "fp16"]) == 1
    assert "--dtype fp16: is for GPUs" in caplog.text


# The parts


def test_the_clock(monkeypatch):
    times = iter([0.0, 10.0, 11.0, 13.0, 16.0])
    monkeypatch.setitem(machine.CLOCKS, "wall", lambda: next(times))
    steps = clock.StepClock(warmup=1, steps=3)
    steps.begin(torch.device("cpu"))
    for _ in range(steps.total):
        steps.before()
        torch.ones(2, 3) @ torch.ones(3, 5)
        steps.before()  # a step of two batches
        torch.ones(2, 3) @ torch.ones(3, 5)
        steps.after()
    assert steps.seconds == [1.0, 2.0, 3.0] and steps.flops == 2 * (2 * 2 * 3 * 5)
    assert steps.peak_bytes > 0


def test_figures_and_their_ratios():
    slow = {"name": "slow", **report.figures({"seconds": [2.0, 2.0, 8.0], "peak_bytes": 4e9, "flops": 4e12}, 2, 8e12)}
    fast = {"name": "fast", **report.figures({"seconds": [0.5], "peak_bytes": 1e9, "flops": None}, 2, 8e12)}
    report.compare([slow, fast], "slow")
    assert (slow["median_step_seconds"], slow["mean_step_seconds"], slow["images_per_second"]) == (2, 4, 1)
    assert (slow["flops_per_second"], slow["share_of_peak"], fast["flops_per_second"]) == (2e12, 0.25, None)
    assert (fast["speed_ratio"], fast["memory_ratio"]) == (4, 0.25)
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in report.table([slow, fast], "slow").split("\n")
    ]
    header, _, first, second = lines
    assert dict(zip(header, first)) == {
        **{"": "slow", "s/step": "2", "(mean)": "4", "steps/s": "0.5", "images/s": "1", "peak GB": "4.00"},
        **{"TFLOP/s": "2", "of peak": "25%", "speed, x slow": "1.00", "memory, x slow": "1.00"},
    }
    assert second[-4:] == ["", "", "4.00", "0.25"]


def test_rounds_become_one():
    found = report.merged(
        [{"seconds": [1.0], "peak_bytes": 5, "flops": 7}, {"seconds": [3.0], "peak_bytes": 4, "flops": 7}]
    )
    assert found == {"seconds": [1.0, 3.0], "peak_bytes": 5, "flops": 7}
    assert report.merged([found, {"failed": "out of memory"}]) == {"failed": "out of memory"}


def test_the_rate_of_a_matrix_product(monkeypatch):
    times = iter([0.0, 0.9, 2.0, 2.5, 3.0, 3.8])  # 0.9, 0.5 and 0.8 s
    monkeypatch.setitem(machine.CLOCKS, "cpu", lambda: next(times))
    assert machine.matmul_rate("cpu", "fp32", torch.get_num_threads(), "cpu", times=2, side=8) == 2 * 8**3 / 0.5


def test_switches(tmp_path):
    assert parse_switch("a name: x.y=1  z.w=2") == ("a name", ["x.y=1", "z.w=2"])
    base = runs.config(tmp_path)
    rows = variants([base], ["model.params.reg_weight=2"], ["x: data.params.batch_size=3"], ["two-forward"])
    assert [(row.name, row.kind) for row in rows] == [("two-forward",) * 2, ("ours",) * 2, ("x", "ours")]
    assert [row.config["data"]["params"]["batch_size"] for row in rows] == [1, 1, 3]
    assert {row.config["model"]["params"]["reg_weight"] for row in rows} == {2}


def test_only_our_rows_have_what_a_training_starts_with(tmp_path, monkeypatch):
    monkeypatch.setattr(host, "HUGE_PAGES", tmp_path)
    switches = ["given back: lightning.callbacks.host_memory=null"]
    found = training_rows([runs.config(tmp_path)], [], switches, ["two-forward"], Settings())
    assert {row.name: bool(row.environment) for row in found} == {
        "ours": True,
        "given back": False,
        "two-forward": False,
    }


def test_a_process_of_its_own():
    assert isolation.apart(os.getpid) != os.getpid()
    assert isolation.apart(os.getenv, "OF_A_ROW", environment={"OF_A_ROW": "1"}) == "1" and "OF_A_ROW" not in os.environ
    with pytest.raises(UserError, match="no such config file"):
        isolation.apart(load_yaml, "nothing.yaml")
    with pytest.raises(UserError, match="the measuring process was killed"):
        isolation.apart(os._exit, 9)
