"""A run that is killed and resumed, or shared by two processes, is the same run.

`KILLS=20 pytest tests/test_exactness.py -k random` kills one run as often, at random moments.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import time
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from ldm.callbacks.csv_log import CsvLog
from ldm.callbacks.setup import SetupCallback
from ldm.training.run import STAMP_VARIABLE, Run, resumed_run
from tests.runs import Workspace, checkpoint, config, csv_rows, same
from tests.starts import DEADLINE, KILL_AT, KILLER, SPY, forked, run_forked

KILLS = int(os.environ.get("KILLS", "4"))
STEPS = 30
DDP = ["--accelerator", "cpu", "--devices", "2", "--strategy", "ddp"]
EMA = "model.params.use_ema=true"
SCHEDULE = "model.params.scheduler_config={target: ldm.lr_scheduler.WarmupDecay, params: {shape: cosine}}"
RUNS = {
    "fp32": [EMA, SCHEDULE],
    "bf16": [EMA, SCHEDULE, "--precision", "bf16-mixed"],
    "accumulated": [EMA, SCHEDULE, "--accumulate_grad_batches", "2"],
    "cached": [EMA, SCHEDULE, "data.params.latent_cache=true"],
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("exactness"))


@pytest.fixture(scope="module")
def base(workspace):
    """The golden model, smaller still: what is tested are the steps, not the network. An epoch has six batches."""
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    unet = {"use_checkpoint": False, "channel_mult": [1], "attention_resolutions": [1], "context_dim": 16}
    size = {"params": {"size": 8}}
    params = {"cond_stage_config": {"params": {"text_config": text}}, "unet_config": {"params": unet}}
    smaller = {
        "model": {"params": params},
        "data": {"params": {"train": size, "reg": size}},
        "lightning": {
            "modelcheckpoint": {"params": {"every_n_train_steps": 4, "save_top_k": 1}},
            "trainer": {"max_steps": STEPS},
        },
    }
    OmegaConf.save(OmegaConf.merge(OmegaConf.load(config(workspace.path)), smaller), path := workspace.path / "s.yaml")
    return path


def train(workspace, base, name, *more, kill=None, status=0):
    """A new run in a process of its own, which `kill` may end; the run's folder."""
    run_forked(workspace.arguments(name, KILLER, *more, base=base), workspace.path / "log", at(kill), status)
    return workspace.run(name)


def resume(workspace, run, kill=None, status=0):
    run_forked(["-r", str(run)], workspace.path / "log", at(kill), status)


def at(kill):
    return {KILL_AT: kill} if kill else {}


@pytest.fixture(scope="module")
def straight(workspace, base):
    """The uninterrupted runs, made when first asked for."""
    made = {}

    def run(kind):
        if kind not in made:
            made[kind] = train(workspace, base, f"{kind}-straight", *RUNS[kind])
        return made[kind]

    return run


def tensors(value, path=""):
    """All tensors in nested containers, by their path."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return {name: tensor for key, inner in items for name, tensor in tensors(inner, f"{path}/{key}").items()}


def logged(run):
    """The numbers of each step; where two starts logged one, those of the later start."""
    numbers = {}
    for row in csv_rows(run):
        for key, value in row.items():
            if key != "step" and value:
                numbers[row["step"], key] = value
    return numbers


def assert_same_end(run, straight, steps=STEPS):
    ours, theirs = checkpoint(run), checkpoint(straight)
    assert ours["global_step"] == theirs["global_step"] == steps
    expected = tensors(theirs)
    assert sum("/model_ema." in name for name in expected) > 100
    assert sum("/optimizer_states/" in name for name in expected) > 100
    found = tensors(ours)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert ours["lr_schedulers"] == theirs["lr_schedulers"]
    assert same(ours["optimizer_states"], theirs["optimizer_states"])
    assert logged(run) == logged(straight)


# Killed and resumed


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_that_is_killed_twice_ends_as_the_uninterrupted_one(workspace, base, straight, kind):
    """Killed with 10 and with 20 steps done: in the middle of an epoch, of a step, and of what is accumulated."""
    run = train(workspace, base, kind, *RUNS[kind], kill="backward:10", status=-signal.SIGKILL)
    assert checkpoint(run)["global_step"] == 8
    resume(workspace, run, kill="start:20", status=-signal.SIGKILL)
    assert checkpoint(run)["global_step"] == 20
    resume(workspace, run)
    assert_same_end(run, straight(kind))


@pytest.mark.parametrize("place", ["last:8", "checkpoint:8"])
def test_a_kill_beside_a_checkpoint_loses_no_row_of_the_log(workspace, base, straight, place):
    name = place.replace(":", "-")
    run = train(workspace, base, name, *RUNS["fp32"], kill=place, status=-signal.SIGKILL)
    assert checkpoint(run)["global_step"] == (8 if place == "last:8" else 4)
    resume(workspace, run)
    assert_same_end(run, straight("fp32"))


def test_a_run_that_is_killed_at_random_moments_ends_as_the_uninterrupted_one(workspace, base):
    """Each start is killed after some changes of the checkpoint folder (also between two of them), or while it starts.

    A run has a checkpoint before it is killed: without one there is nothing to go on from.
    """
    chance, more = random.Random(0), [EMA, SCHEDULE, "--max_steps", str(8 * KILLS)]
    arguments = workspace.arguments("random", KILLER, *more, base=base)
    kills = 0
    while (process := forked(arguments, workspace.path / "log")) and kills < KILLS:
        wait_for_changes(workspace, "random", chance.randrange(9), process, starting=chance.random() < 0.25)
        time.sleep(chance.uniform(0, 0.1))
        process.kill()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL, (workspace.path / "log").read_text()[-3000:]
        kills += 1
        print(f"kill {kills}: the last checkpoint is of step {checkpoint(workspace.run('random'))['global_step']}")
        arguments = ["-r", str(workspace.run("random"))]
    process.join()
    assert process.exitcode == 0, (workspace.path / "log").read_text()[-3000:]
    assert kills > 0
    straight = train(workspace, base, "random-straight", *more)
    assert_same_end(workspace.run("random"), straight, 8 * KILLS)


def wait_for_changes(workspace, name, count, process, starting):
    """Until the names in the run's checkpoint folder have changed `count` times, or the process is half-way there."""
    pattern = f"*_{name}/checkpoints"
    while not list(workspace.logs.glob(f"{pattern}/last.ckpt")) and process.is_alive():
        time.sleep(0.01)
    (folder,) = workspace.logs.glob(pattern)
    if starting:
        return time.sleep(random.uniform(0, 1))
    seen = set(os.listdir(folder))
    while count and process.is_alive():
        time.sleep(0.001)
        if (now := set(os.listdir(folder))) != seen:
            seen, count = now, count - 1


def test_a_config_that_a_kill_cuts_short_is_not_there(tmp_path, monkeypatch):
    def save_half(config, path):
        path.write_text(OmegaConf.to_yaml(config)[:-3])
        raise KeyboardInterrupt

    run = Run(tmp_path, "2020-01-01T00-00-00", tmp_path / "checkpoints" / "last.ckpt")
    stub = SimpleNamespace(is_global_zero=True)
    SetupCallback(run, {"run": {"seed": 1234}}).setup(stub, None, "fit")
    before = {path.name: path.read_text() for path in run.saved_configs()}
    monkeypatch.setattr(OmegaConf, "save", save_half)
    later = Run(tmp_path, "2020-01-02T00-00-00", run.resume_from)
    with pytest.raises(KeyboardInterrupt):
        SetupCallback(later, {"run": {"seed": 1234}}).setup(stub, None, "fit")
    assert {path.name: path.read_text() for path in later.saved_configs()} == before


def test_what_killed_saves_leave_is_removed(tmp_path):
    for name in ("checkpoints/last.ckpt", "configs/a-project.yaml", "csv/a/metrics.csv"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
        (tmp_path / name).with_name(f".{(tmp_path / name).name}.1.tmp").touch()
    resumed_run(str(tmp_path))
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 3


def test_a_log_that_gets_columns_is_never_without_its_rows(tmp_path, monkeypatch):
    log = CsvLog(tmp_path, name="csv", version="a")
    log.log_ahead({"train/loss": 0.5}, 0)
    log.log_metrics({"train/loss": 0.5}, 0)  # Lightning's own, later
    monkeypatch.setattr(os, "replace", lambda source, target: pytest.fail("killed here"))
    log.log_metrics({"val/loss": 0.25}, 1)
    with pytest.raises(pytest.fail.Exception):
        log.save()
    assert csv_rows(tmp_path) == [{"step": "0", "train/loss": "0.5"}]


# Two processes


def ranks(workspace, name, base, *more):
    """What the two processes of a run found, each started as a cluster would start it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "NODE_RANK": "0"}
    environment |= {"TEST_SPY": str(workspace.path), STAMP_VARIABLE: "2020-01-01T00-00-00"}
    arguments = workspace.arguments(name, SPY, *DDP, *more, base=base)
    log = workspace.path / "log"
    processes = [forked(arguments, log, {**environment, "LOCAL_RANK": str(rank)}) for rank in (0, 1)]
    try:
        for process in processes:
            process.join(DEADLINE)
            assert process.exitcode == 0, log.read_text()[-3000:]
    finally:
        for process in processes:
            process.kill()
    return found_by_ranks(workspace)


def found_by_ranks(workspace):
    return [torch.load(workspace.path / f"rank{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("accumulated", [1, 2])
def test_two_processes_compute_what_one_does_with_twice_the_batch(workspace, base, accumulated):
    more = ["--max_steps", "10", "--accumulate_grad_batches", str(accumulated), "model.base_learning_rate=1e-6"]
    first, second = ranks(workspace, f"ranks-{accumulated}", base, *more)
    assert same(first["weights"], second["weights"])
    assert same(checkpoint(workspace.run(f"ranks-{accumulated}"))["state_dict"], first["weights"])
    single = train(workspace, base, f"single-{accumulated}", "data.params.batch_size=2", *more)
    theirs = checkpoint(single)["state_dict"]
    differences = {name: (first["weights"][name] - theirs[name]).abs().max().item() for name in theirs}
    print(max(differences.items(), key=lambda item: item[1]))
    print(first["counts"])
    assert max(differences.values()) < 1e-6
