"""Whatever ends a run early, wherever: its status, its message, what is on disk, and that it goes
on as if nothing was.

`WHOLE=1` tries every signal, an error and a full disk at every place, with one process and with
two; its table goes to the file that the variable TABLE names. Without it some of them are tried.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
from pathlib import Path

import pytest

from tests.support.exact import EMA, SCHEDULE, assert_same_end, smallest
from tests.support.runs import Workspace, checkpoint
from tests.support.starts import DEADLINE, forked
from tests.support.stops import KINDS, PLACES, STOP

WHOLE = bool(os.environ.get("WHOLE"))
STEPS = 8
STATUS = {
    "SIGINT": 130,
    "SIGTERM": 143,
    "SIGHUP": 129,
    "SIGUSR1": 0,
    "SIGKILL": -9,
    "exception": 1,
    "disk full": 1,
}
BEFORE = ("start", "class images", "latents")  # the first step
DDP = ["--accelerator", "cpu", "--devices", "2", "--strategy", "ddp"]
# The step of the last checkpoint. With one process a signal ends the run before the next step
# begins, or in the middle of pictures; two have to agree, behind a step. What is killed, or has a
# full disk, has what was written before.
SIGNALLED = {"training": 6, "checkpoint": 4, "sampling": 3, "export": 8}
LEFT = {
    "exception": {"training": 5, "checkpoint": 4, "sampling": 3, "export": 8},
    "SIGKILL": {"training": 4, "checkpoint": 2, "sampling": 2, "export": 8},
    "disk full": {"training": 4, "checkpoint": 2, "sampling": 2, "export": 8},
}
SHORT = [
    *[("SIGTERM", place, 1) for place in ("class images", "checkpoint", "sampling", "export")],
    ("SIGUSR1", "training", 1), ("exception", "training", 1), ("disk full", "checkpoint", 1), ("SIGHUP", "training", 2),
]  # fmt: skip
CASES = [(what, place, n) for n in (1, 2) for what in KINDS for place in PLACES] if WHOLE else SHORT


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("stops"))


@pytest.fixture(scope="module")
def base(workspace):
    return smallest(workspace, STEPS)


def arguments(workspace, base, name, processes):
    """A run with every stage in it: it lacks two class images, caches latents, draws panels, and
    exports.
    """
    folder = workspace.path / f"class-{name}"
    shutil.copytree(workspace.class_images, folder, dirs_exist_ok=True)
    pictures = "{target: main.ImageLogger, params: {batch_frequency: 3, increase_log_steps: false, log_images_kwargs: "
    pictures += "{ddim_steps: 1}, panel: {prompts: [a dog], images: 1}}}"
    more = [
        *(DDP if processes == 2 else []), EMA, SCHEDULE, "--export", "fp32", "data.params.num_class_images=6",
        "data.params.class_images={steps: 1, batch_size: 1}", "data.params.latent_cache=true",
        f"lightning.callbacks.image_logger={pictures}", "lightning.modelcheckpoint.params.every_n_train_steps=2",
    ]  # fmt: skip
    given = workspace.arguments(name, *more, base=base)
    given[given.index("--reg_data_root") + 1] = str(folder)
    return given


def start(workspace, given, name, processes, stop=""):
    """Run the processes to their end; their statuses and what they said."""
    log = workspace.path / f"log-{name}"
    log.unlink(missing_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank in range(processes):
        environment = {STOP: stop}
        if processes == 2:
            environment |= {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "WORLD_SIZE": "2",
                "GROUP_RANK": "0",
            }
            environment |= {"TORCHELASTIC_RUN_ID": name, "RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
            environment |= {"LOCAL_RANK": str(rank)}
        started.append(forked(given, log, environment))
    try:
        for process in started:
            process.join(DEADLINE)
        return [process.exitcode for process in started], log.read_text()
    finally:
        for process in started:
            process.kill()


@pytest.fixture(scope="module")
def straight(workspace, base):
    """The uninterrupted runs, made when first asked for."""
    made = {}

    def run(processes):
        if processes not in made:
            name = f"straight{processes}"
            statuses, said = start(
                workspace, arguments(workspace, base, name, processes), name, processes
            )
            assert set(statuses) == {0}, said
            made[processes] = workspace.run(name)
        return made[processes]

    return run


@pytest.mark.parametrize(("what", "place", "processes"), CASES)
def test_what_ends_a_run_early_loses_no_step(workspace, base, straight, what, place, processes):
    name = f"{what}-{place}-{processes}".replace(" ", "_")
    given = arguments(workspace, base, name, processes)
    statuses, said = start(workspace, given, name, processes, stop=f"{place}/{what}/0")
    runs = list(workspace.logs.glob(f"*_{name}"))
    left = step_left(what, place, processes)
    try:
        assert statuses[0] == STATUS[what], said
        assert None not in statuses, f"a process is left over: {said}"
        assert "Done" not in said or what == "SIGUSR1"
        check_message(what, place, left, said)
        check_files(runs, workspace.path / f"class-{name}", left, what)
    finally:
        tabulate(what, place, processes, statuses, said, runs)

    # It goes on, or begins anew, and ends as the uninterrupted run.
    if what == "SIGKILL" and left is None:
        shutil.rmtree(runs[0], ignore_errors=True) if runs else None
    if what != "SIGUSR1":
        again = ["-r", str(runs[0])] if left is not None else given
        statuses, said = start(workspace, again, name, processes)
        assert set(statuses) == {0}, said
    run = workspace.run(name)
    assert_same_end(run, straight(processes), STEPS)
    assert not list(run.rglob(".*.tmp"))
    assert len(list(run.glob("checkpoints/*-fp32.safetensors"))) == 1


def step_left(what, place, processes):
    """The step of the last checkpoint, None if there is none."""
    if place in BEFORE:
        return STEPS if what == "SIGUSR1" else None
    if what == "SIGUSR1":
        return STEPS
    if what in LEFT:
        return LEFT[what][place]
    return 5 if (processes, place) == (2, "checkpoint") else SIGNALLED[place]


def check_message(what, place, left, said):
    lines = said.splitlines()
    if what == "SIGKILL":
        return
    if what == "SIGUSR1":
        saved = {
            "training": "step 6 is saved in ",
            "checkpoint": "step 5 is saved in ",
            "sampling": "step 3 is saved",
        }
        assert saved.get(place, "SIGUSR1: no step is being trained") in said
        return
    if what.startswith("SIG"):
        (line,) = [line for line in lines if line.startswith(f"interrupted by {what}; ")]
        assert "Traceback" not in said
    elif what == "disk full":
        others = ("process 0", "the first process")  # what the second process says
        errors = [line for line in lines if line.startswith("error: ")]
        (line,) = [line for line in errors if not any(words in line for words in others)]
        assert "No space left" in line or "GB free" in line
        assert "Traceback" not in line
    else:
        assert "broken on purpose" in said
        line = said
    if place == "export":
        assert "the training itself is done" in line and "scripts/convert.py --ckpt" in line
    elif left is not None:
        assert f"step {left} is saved in " in line or (
            what == "disk full" and "no further step" in line
        )
        assert "python main.py -r " in line


def check_files(runs, class_images, left, what):
    if left is None:
        # Every picture that was made is whole and stays; the run that made no step leaves nothing.
        assert runs == [] or what == "SIGKILL"
        assert not [path for path in class_images.iterdir() if path.stat().st_size == 0]
        return
    (run,) = runs
    assert checkpoint(run)["global_step"] == left
    for path in run.glob("checkpoints/*.ckpt"):
        assert checkpoint(run, path.name)["state_dict"]
    if what != "SIGKILL":
        assert not list(run.rglob(".*.tmp")) and not list(class_images.rglob(".*.tmp"))


def tabulate(what, place, processes, statuses, said, runs):
    """Write a row of the table that WHOLE=1 makes."""
    if not (table := os.environ.get("TABLE")):
        return
    says = [
        line
        for line in said.splitlines()
        if line.startswith(("interrupted by", "error: ", "SIGUSR1", "step "))
    ]
    steps = [
        checkpoint(run)["global_step"] for run in runs if (run / "checkpoints/last.ckpt").exists()
    ]
    message = says[-1][:110] if says else ("traceback" if "Traceback" in said else "")
    row = [
        what,
        place,
        processes,
        statuses,
        f"step {steps[0]}" if steps else ("nothing" if not runs else "folder"),
    ]
    with Path(table).open("a") as file:
        file.write("| " + " | ".join(map(str, [*row, message])) + " |\n")


def test_the_table_of_statuses_is_that_of_shells():
    assert STATUS["SIGTERM"] == 128 + signal.SIGTERM and STATUS["SIGHUP"] == 128 + signal.SIGHUP
