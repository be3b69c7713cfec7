"""Processes that torchrun or SLURM's srun started, on one machine or on several: each finds its
place by itself.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Any

from ldm.errors import UserError

if TYPE_CHECKING:
    from subprocess import Popen

    import pytorch_lightning as pl
    from torch.distributed import Store

POLL = 0.1  # seconds between two looks whether another process is ready
DECIDED, FAILED = "decided: ", "failed"  # how the first process's answers begin

# Of torchrun, of srun, and of Lightning's own launcher.
RANKS = ("RANK", "SLURM_PROCID", "NODE_RANK", "LOCAL_RANK")
_questions = itertools.count()  # that the processes of a run answer in the same order


def is_first() -> bool:
    """Return whether this is the first process of a run, or the only one."""
    return not any(int(os.environ.get(name) or 0) for name in RANKS)


def _environment() -> Any | None:
    """Return Lightning's idea of what started this process and others; None if this program alone
    does.
    """
    if not {"TORCHELASTIC_RUN_ID", "SLURM_PROCID"} & set(os.environ):
        return None  # without the seconds that Lightning takes to import
    from lightning_fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

    kind = next(
        (kind for kind in (TorchElasticEnvironment, SLURMEnvironment) if kind.detect()), None
    )
    return kind() if kind is not None else None


@cache
def _store(address: str, port: int, rank: int, size: int) -> Store:
    """Return where the processes leave notes for each other; torch's process group uses it, too."""
    from torch.distributed import rendezvous

    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    store, _, _ = next(iter(rendezvous("env://", rank, size)))
    return store


def agreed(decide: Callable[[], str]) -> str:
    """Return what the first process decides, on all of them.

    Raises:
        UserError: the first process could not decide.
    """
    environment = _environment()
    if environment is None or environment.world_size() == 1:
        return decide()
    rank, size = environment.global_rank(), environment.world_size()
    store = _store(environment.main_address, environment.main_port, rank, size)
    question = f"dreambooth/{next(_questions)}"
    if rank > 0:
        return _answer(store, question)
    try:
        decided = decide()
    except BaseException:
        store.set(question, FAILED)
        raise
    store.set(question, DECIDED + decided)
    return decided


def _answer(store: Store, question: str) -> str:
    """Wait for the first process, however long it takes, and return what it has decided."""
    try:
        while not store.check([question]):
            time.sleep(POLL)
        answer = store.get(question).decode()
    except RuntimeError as error:  # the store is the first process's
        raise UserError("stopped, for the first process of this run has ended") from error
    if answer == FAILED:
        raise UserError("stopped, for the first process of this run could not go on")
    return answer.removeprefix(DECIDED)


def share() -> tuple[int, int]:
    """Return this process's place among those of torchrun or srun, and how many they are."""
    environment = _environment()
    if environment is None:
        return 0, 1
    return environment.global_rank(), environment.world_size()


def place_on_machine() -> int:
    """Return this process's place among those on its machine."""
    environment = _environment()
    return 0 if environment is None else environment.local_rank()


def wait_for_all() -> None:
    """Return in the first process when all others have called this, and in them at once.

    Raises:
        UserError: another process has ended in another way.
    """
    environment = _environment()
    if environment is None or environment.world_size() == 1:
        return
    rank, size = environment.global_rank(), environment.world_size()
    store = _store(environment.main_address, environment.main_port, rank, size)
    question = f"dreambooth/{next(_questions)}"
    if rank > 0:
        store.set(f"{question}/{rank}", DECIDED)
        return
    for other in range(1, size):
        _answer(store, f"{question}/{other}")


def first_alone(act: Callable[[], object]) -> None:
    """Let the first process act while the others wait until it has.

    Processes that Lightning starts have nothing to wait for: it starts them later.
    """

    def decide() -> str:
        if is_first():
            act()
        return "done"

    agreed(decide)


def is_child() -> bool:
    """Return whether Lightning has started this process beside the one that the user has
    started.
    """
    others = {"TORCHELASTIC_RUN_ID", "SLURM_PROCID"} & set(os.environ)
    return not others and int(os.environ.get("LOCAL_RANK") or 0) > 0


# One process of a training fails


FAILURE = "dreambooth/failure"  # where the group's store keeps what the first failing process says
_has_told = False


def tell_failure(trainer: Any, error: BaseException) -> None:
    """Tell the first process why this one leaves the training, unless another one has said it.

    The first process learns of it when what it waits for fails. This process can then end with
    status 0, for its launcher would otherwise kill the first one while that saves a checkpoint.
    NCCL does not notice that a process is gone: there a launcher has to end the others.
    """
    global _has_told
    store = _group_store()
    if store is None or trainer.strategy.process_group_backend != "gloo":
        return
    with suppress(Exception):  # the store is gone with the first process
        if not store.check([FAILURE]):
            text = " ".join(str(error).split()) or type(error).__name__
            store.set(FAILURE, f"process {trainer.global_rank}: {text}")
        _has_told = True


def has_told_failure() -> bool:
    """Return whether the first process knows that this one has failed, and will say so itself."""
    return _has_told


def failure_of_others() -> str:
    """Return what another process of the group has said before it left, or nothing."""
    store = _group_store()
    with suppress(Exception):
        if store is not None and store.check([FAILURE]):
            return store.get(FAILURE).decode()
    return ""


def _group_store() -> Store | None:
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    return distributed.distributed_c10d._get_default_store()


def take_children(trainer: pl.Trainer) -> list[Popen[bytes]]:
    """Return the processes that Lightning has started, and have it watch them no more.

    It would kill this process as soon as one of them has failed.
    """
    processes = getattr(trainer.strategy.launcher, "procs", [])
    children = list(processes)
    processes.clear()
    return children


def end_children(children: Iterable[Popen[bytes]], patience: float = 5.0) -> None:
    """Wait for processes that end by themselves, and kill those that do not."""
    deadline = time.monotonic() + patience
    for child in children:
        while child.poll() is None and time.monotonic() < deadline:
            time.sleep(POLL)
        if child.poll() is None:
            child.kill()


def is_sharded(trainer: pl.Trainer) -> bool:
    """Return whether no process has all of the weights."""
    from pytorch_lightning.strategies import FSDPStrategy

    return isinstance(trainer.strategy, FSDPStrategy)


def computes(trainer: pl.Trainer) -> bool:
    """Return whether this process runs the networks where one result is wanted, such as a picture.

    The first one does, and where weights are sharded all others with it, for they hold parts of
    them.
    """
    return trainer.is_global_zero or is_sharded(trainer)
