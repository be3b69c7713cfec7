"""Processes that torchrun or SLURM's srun started, on one machine or on several: each finds its place by itself."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from functools import cache
from typing import Any

RANKS = ("RANK", "SLURM_PROCID", "LOCAL_RANK")  # of torchrun, of srun, and of Lightning's own launcher
_questions = itertools.count()  # that the processes of a run answer in the same order


def is_first() -> bool:
    """Whether this is the first process of a run, or the only one."""
    return not any(int(os.environ.get(name) or 0) for name in RANKS)


def _environment() -> Any | None:
    """Lightning's idea of what started this process and others; None if nothing but this program starts others."""
    if not {"TORCHELASTIC_RUN_ID", "SLURM_PROCID"} & set(os.environ):
        return None  # without the seconds that Lightning takes to import
    from lightning_fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

    kind = next((kind for kind in (TorchElasticEnvironment, SLURMEnvironment) if kind.detect()), None)
    return kind() if kind is not None else None


@cache
def _store(address: str, port: int, rank: int, size: int) -> Any:
    """Where the processes leave notes for each other; torch's process group will use the same one."""
    from torch.distributed import rendezvous

    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    store, _, _ = next(iter(rendezvous("env://", rank, size)))
    return store


def agreed(decide: Callable[[], str]) -> str:
    """What the first process decides, on all of them."""
    environment = _environment()
    if environment is None or environment.world_size() == 1:
        return decide()
    rank = environment.global_rank()
    store = _store(environment.main_address, environment.main_port, rank, environment.world_size())
    question = f"dreambooth/{next(_questions)}"
    if rank == 0:
        store.set(question, decide())
    return store.get(question).decode()
