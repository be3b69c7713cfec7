"""A run that is killed and resumed, or shared by two processes, is the same run.

A start here is forked from a process that has imported everything. `WHOLE=1` makes the runs longer
and more of them, `ANEW=1` starts each as `python main.py`, and `KILLS=20` kills one of them as
often, at random moments.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import socket
import time
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

import main
from ldm.callbacks.csv_log import CsvLog
from ldm.callbacks.setup import SetupCallback
from ldm.errors import UserError
from ldm.training.run import STAMP_VARIABLE, Run, held
from tests.support.cascade import ENLARGING, IN_PIXELS
from tests.support.exact import EMA, SCHEDULE, assert_same_end, smallest
from tests.support.runs import Workspace, checkpoint, csv_rows, same, without_class_images
from tests.support.starts import DEADLINE, KILL_AT, KILLER, SPY, begin, forked, run_to_end

log = logging.getLogger(__name__)

WHOLE = bool(os.environ.get("WHOLE"))
KILLS = int(os.environ.get("KILLS", "4"))
STEPS = 30 if WHOLE else 15
DDP = ["--accelerator", "cpu", "--devices", "2", "--strategy", "ddp"]
BF16 = ["--precision", "bf16-mixed"]
ACCUMULATED = ["--accumulate_grad_batches", "2"]
CACHED = ["data.params.latent_cache=true"]
# Its masks and its masked images are drawn, too.
INPAINTING = [
    "model.params.conditioning_key=hybrid",
    "model.params.unet_config.params.in_channels=9",
]
# Both in one run, with which most of these tests are made.
INPAINTED = [*ACCUMULATED, *INPAINTING]
# The prior is compared with a copy of the weights, which a run that goes on has to have again.
TAUGHT = ["model.params.preservation=prior_prediction"]
# The prior without class images: on the photos, as the class and as nothing. The subject counts less
# at noisy steps.
OUTPUTS = ["model.params.preservation=dop", "model.params.noisy_step_weight=0.3"]
BLANK = ["model.params.preservation=blank"]
ADAPTERS = ["model.params.lora={rank: 2}", "model.params.use_ema=false"]
# Only new words train: two vectors, which the optimizer's state is of.
WORDS = [
    "model.params.unfreeze_model=false",
    "model.params.use_ema=false",
    "model.params.personalization_config={target: ldm.modules.embedding_manager.EmbeddingManager, "
    "params: {placeholder_strings: ['*'], initializer_words: [dog], num_vectors_per_token: 2}}",
]
# The model around them trains, which stay as they are: with the prior left alone.
NONE = ["model.params.preservation=none"]
PIVOTAL = [
    WORDS[2].replace("num_vectors_per_token: 2", "num_vectors_per_token: 2, pivotal: true"),
    *NONE,
]
# Two subjects, of which one has its turn twice as often.
CONCEPTS = [
    "data.params.concepts=["
    "{data_root: HERE/photos, class_word: dog, reg_data_root: HERE/class_images}, "
    "{data_root: HERE/photos2, class_word: cat, reg_data_root: HERE/class_images2, "
    "identifier: zwx, weight: 2}]"
]
# What a run may choose by itself, beside the cache.
CHOSEN = [
    "model.params.optimizer=adamw_in_backward",
    "model.params.unet_config.params.use_checkpoint=attention",
    "model.params.unet_config.params.channels_last=true",
]
RUNS = {
    "accumulated": INPAINTED,
    "bf16-cached-chosen-taught": [*BF16, *CACHED, *CHOSEN, *TAUGHT],
    "words": WORDS,
    # A cascade's second model, with noise on small pictures; its first one is in pixels.
    "enlarging": ENLARGING,
    "concepts-in-pixels": [*CONCEPTS, *IN_PIXELS],
    "outputs": OUTPUTS,
    "adapters": [*ADAPTERS, *BLANK],
    "pivotal": PIVOTAL,
}
NOT_WHOLE = ("words", "adapters")  # what keeps no averages and trains a small part
if WHOLE:
    RUNS |= {"fp32": [], "bf16": BF16, "cached": CACHED, "bf16-accumulated": [*BF16, *ACCUMULATED]}
    RUNS |= {"inpainting": INPAINTING}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("exactness"))


@pytest.fixture(scope="module")
def base(workspace):
    return smallest(workspace, STEPS)


@pytest.fixture(autouse=True)
def deterministic_as_before(monkeypatch):
    """Lightning sets these for the whole process."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    yield
    torch.use_deterministic_algorithms(False)


def train(workspace, base, name, *more, kill=None, status=0):
    """A new run in a process of its own, which `kill` may end; the run's folder."""
    run_to_end(
        arguments_of(workspace, name, KILLER, *more, base=base),
        workspace.path / "log",
        at(kill),
        status,
    )
    return workspace.run(name)


def arguments_of(workspace, name, *more, base):
    """The command line of a new run, without class images for what takes none."""
    found = workspace.arguments(name, *more, base=base)
    takes_none = any(word in more for word in (OUTPUTS[0], BLANK[0], NONE[0]))
    return without_class_images(found) if takes_none else found


def resume(workspace, run, *more, kill=None, status=0):
    run_to_end(["-r", str(run), *more], workspace.path / "log", at(kill), status)


def at(kill):
    return {KILL_AT: kill} if kill else {}


@pytest.fixture(scope="module")
def straight(workspace, base):
    """The uninterrupted runs, made when first asked for."""
    made = {}

    def run(kind):
        if kind not in made:
            made[kind] = train(workspace, base, f"{kind}-straight", EMA, SCHEDULE, *RUNS[kind])
        return made[kind]

    return run


# Stopped, killed, and resumed


def test_a_run_that_is_stopped_ends_as_the_uninterrupted_one(workspace, base, straight):
    parts = train(workspace, base, "stopped", EMA, SCHEDULE, *INPAINTED, "--max_steps", "5")
    resume(workspace, parts, "--max_steps", "7")
    # From a checkpoint that was written in passing, too.
    resume(workspace, parts / "checkpoints/epoch=000001-step=000000004.ckpt", "--max_steps", "7")
    resume(workspace, parts, "--max_steps", str(STEPS))
    assert_same_end(parts, straight("accumulated"), STEPS)


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_that_is_killed_twice_ends_as_the_uninterrupted_one(workspace, base, straight, kind):
    """Killed in the middle of an epoch, of a step and, where there is that, of what is
    accumulated.
    """
    third = STEPS // 3
    more = [EMA, SCHEDULE, *RUNS[kind]]
    run = train(workspace, base, kind, *more, kill=f"backward:{third}", status=-signal.SIGKILL)
    assert checkpoint(run)["global_step"] == third // 4 * 4
    resume(workspace, run, kill=f"start:{2 * third}", status=-signal.SIGKILL)
    assert checkpoint(run)["global_step"] == 2 * third // 4 * 4
    resume(workspace, run)
    assert_same_end(run, straight(kind), STEPS, whole=kind not in NOT_WHOLE)


@pytest.mark.parametrize("place", ["last:8", "checkpoint:8"])
def test_a_kill_beside_a_checkpoint_loses_no_row_of_the_log(workspace, base, straight, place):
    name, more = place.replace(":", "-"), [EMA, SCHEDULE, *INPAINTED]
    run = train(workspace, base, name, *more, kill=place, status=-signal.SIGKILL)
    assert checkpoint(run)["global_step"] == (8 if place == "last:8" else 4)
    resume(workspace, run)
    assert_same_end(run, straight("accumulated"), STEPS)


def test_a_run_that_is_killed_at_random_moments_ends_as_the_uninterrupted_one(workspace, base):
    """Each start is killed after some changes of the checkpoint folder (also between two of them),
    or while it starts.

    A run has a checkpoint before it is killed: without one there is nothing to go on from.
    """
    chance, more = random.Random(0), [EMA, SCHEDULE, "--max_steps", str(8 * KILLS)]
    arguments = workspace.arguments("random", KILLER, *more, base=base)
    kills = 0
    while (process := begin(arguments, workspace.path / "log")) and kills < KILLS:
        wait_for_changes(
            workspace, "random", chance.randrange(9), process, starting=chance.random() < 0.25
        )
        time.sleep(chance.uniform(0, 0.1))
        process.kill()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL, (workspace.path / "log").read_text()[-3000:]
        kills += 1
        log.info(
            "kill %d: the last checkpoint is of step %d",
            kills,
            checkpoint(workspace.run("random"))["global_step"],
        )
        arguments = ["-r", str(workspace.run("random"))]
    process.join()
    assert process.exitcode == 0, (workspace.path / "log").read_text()[-3000:]
    assert kills > 0
    straight = train(workspace, base, "random-straight", *more)
    assert_same_end(workspace.run("random"), straight, 8 * KILLS)


def wait_for_changes(workspace, name, count, process, starting):
    """Until the names in the run's checkpoint folder have changed `count` times, or the process is
    half-way there.
    """
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
    with held(Run(tmp_path, "2020-01-01T00-00-00")):
        pass
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
    environment = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": "2",
        "NODE_RANK": "0",
    }
    environment |= {"TEST_SPY": str(workspace.path), STAMP_VARIABLE: "2020-01-01T00-00-00"}
    arguments = arguments_of(workspace, name, SPY, *DDP, *more, base=base)
    log = workspace.path / "log"
    processes = [
        forked(arguments, log, {**environment, "LOCAL_RANK": str(rank)}) for rank in (0, 1)
    ]
    try:
        for process in processes:
            process.join(DEADLINE)
            assert process.exitcode == 0, log.read_text()[-3000:]
    finally:
        for process in processes:
            process.kill()
    return [torch.load(workspace.path / f"rank{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize(
    "accumulated, kind",
    [
        *[(1, []), (2, TAUGHT), (1, INPAINTING), (1, WORDS), (1, ENLARGING)],
        *[
            (1, [*CONCEPTS, *IN_PIXELS]),
            (1, OUTPUTS),
            (2, [*ADAPTERS, *BLANK]),
            (1, [*ADAPTERS, *PIVOTAL]),
        ],
    ],
)
def test_two_processes_compute_what_one_does_with_twice_the_batch(
    workspace, base, accumulated, kind
):
    # In float64: two batches of one are not rounded as one of two, and AdamW makes whole steps of
    # rounding.
    more = [
        "--max_steps",
        "6",
        "--accumulate_grad_batches",
        str(accumulated),
        "model.base_learning_rate=1e-6",
    ]
    # Cached latents are kept in float32.
    more += ["--precision", "64-true", "data.params.latent_cache=false", *kind]
    name = f"{accumulated}-{len(''.join(kind))}"
    first, second = ranks(workspace, f"ranks-{name}", base, *more)
    # Each rank wrote what it ended with: rank 0's checkpoint alone could not show a difference.
    assert same(first["weights"], second["weights"])
    assert same(checkpoint(workspace.run(f"ranks-{name}"))["state_dict"], first["weights"])
    single = train(workspace, base, f"single-{name}", "data.params.batch_size=2", *more)
    theirs = checkpoint(single)["state_dict"]
    # Steps of 1e-6 move a weight by up to 1e-5; other batches would make differences of that size.
    assert (
        max((first["weights"][name] - theirs[name]).abs().max().item() for name in theirs) < 1e-12
    )
    # An epoch has three batches for each, of which two are accumulated and the last is not: six
    # steps are two epochs or three.
    assert first["counts"]["gradients"] == 6
    assert first["counts"]["decisions"] <= 4 * 6


# lightning.trainer.deterministic


def test_a_deterministic_run_is_the_same_on_the_cpu(workspace, base, straight):
    run = train(
        workspace,
        base,
        "deterministic",
        EMA,
        SCHEDULE,
        *INPAINTED,
        "lightning.trainer.deterministic=true",
    )
    assert_same_end(run, straight("accumulated"), STEPS)


def test_determinism_is_asked_for_before_a_gpu_computes(workspace, base, monkeypatch):
    """cuBLAS reads its variable when it is first used."""
    found = []

    def build_model(*_, **__):
        found.append(
            (os.environ["CUBLAS_WORKSPACE_CONFIG"], torch.are_deterministic_algorithms_enabled())
        )
        raise UserError("far enough")

    monkeypatch.setattr("ldm.training.train.build_model", build_model)
    assert main.main(workspace.arguments("cublas", "--deterministic", "true", base=base)) == 1
    assert found == [(":4096:8", True)]
