"""Two processes that have what torchrun or SLURM's srun would tell them: forks of this one."""

from __future__ import annotations

import logging
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch


def of_torchrun(rank: int) -> dict[str, str]:
    """What torchrun tells a process of two."""
    return {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
        **{"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"},
    }


def of_slurm(rank: int) -> dict[str, str]:
    """What srun tells a process, of one on each of two machines."""
    return {
        **{
            "SLURM_NTASKS": "2",
            "SLURM_NTASKS_PER_NODE": "1",
            "SLURM_NNODES": "2",
            "SLURM_JOB_ID": "1234",
        },
        **{
            "SLURM_PROCID": str(rank),
            "SLURM_NODEID": str(rank),
            "SLURM_LOCALID": "0",
            "SLURM_JOB_NAME": "train",
        },
    }


def _process(
    folder: Path, job: Callable[[int], None], rank: int, environment: dict[str, str]
) -> None:
    log = os.open(folder / f"log{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    sys.stdout = sys.stderr = open(log, "w", buffering=1)  # noqa: SIM115 - until the process ends
    os.chdir(folder)
    logging.getLogger().handlers.clear()  # of pytest
    os.environ.update(environment)
    # OpenMP's threads are not copied by a fork: where this process has used some (TEST_THREADS=2),
    # the copy would wait for them for ever.
    torch.set_num_threads(1)
    status = 1
    try:
        job(rank)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def together(
    folder: Path, job: Callable[[int], None], environment: Callable[[int], dict[str, str]]
) -> None:
    """Run `job(rank)` in two processes, in `folder`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    fork = multiprocessing.get_context("fork")
    processes = [
        fork.Process(target=_process, args=(folder, job, rank, {**master, **environment(rank)}))
        for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    hung = [process.is_alive() for process in processes]
    for process in processes:
        process.kill()
    logs = "\n".join((folder / f"log{rank}").read_text() for rank in (0, 1))
    assert not any(hung), f"hangs: {hung}\n{logs}"
    assert [process.exitcode for process in processes] == [0, 0], logs
