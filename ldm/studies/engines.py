"""Where the tasks of a study run: processes of this machine, Ray, or SLURM.

An engine takes a function and tasks, and yields each task with its result as it ends. It asks for
the next task only when it has room for it, so that a searcher can learn from what has ended.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

from ldm.errors import UserError
from ldm.host import end_with_parent

log = logging.getLogger(__name__)

Task = dict[str, Any]  # plain values: another machine may do it
Work = Callable[[Task], Any]
POLL = 1.0  # seconds between two looks at a cluster's jobs


@dataclass(frozen=True)
class Failure:
    """What is there instead of a result: the study goes on with its other tasks."""

    message: str


class Engine(Protocol):
    """Does tasks somewhere, some at once."""

    def run(self, work: Work, tasks: Iterator[Task]) -> Iterator[tuple[Task, Any]]:
        """Yield each task with what `work` returns for it, or with a `Failure`."""
        ...


def attempt(work: Work, task: Task) -> Any:
    """Do a task; an error becomes a `Failure`. A stop signal is no error."""
    try:
        return work(task)
    except UserError as error:
        return Failure(str(error))
    except Exception as error:
        log.exception("task %s", task.get("name", ""))
        return Failure(f"{type(error).__name__}: {error}")


class Local:
    """Processes of this machine; one task at a time runs in this process itself.

    Args:
        workers: tasks at once.
        devices: GPUs by number, of which each worker has one to itself.
    """

    def __init__(self, workers: int = 1, devices: list[int] | None = None):
        self.workers, self.devices = workers, devices or []

    def run(self, work: Work, tasks: Iterator[Task]) -> Iterator[tuple[Task, Any]]:
        if self.workers == 1:
            for each in tasks:
                yield each, attempt(work, each)
            return
        # A new process for each task: what one leaves behind, or its end, does not reach the next.
        context = multiprocessing.get_context("spawn")
        running: dict[Connection, tuple[int, Any, Task]] = {}
        free = list(reversed(range(self.workers)))
        try:
            while True:
                while free and (task := next(tasks, None)) is not None:
                    slot = free.pop()
                    ours, theirs = context.Pipe(duplex=False)
                    target = (work, task, theirs, self._device(slot))
                    process = context.Process(target=_in_process, args=target)
                    process.start()
                    theirs.close()
                    running[ours] = slot, process, task
                if not running:
                    return
                for ready in wait(list(running)):
                    assert isinstance(ready, Connection)
                    slot, process, task = running.pop(ready)
                    result = _received(ready, process)
                    free.append(slot)
                    yield task, result
        finally:
            for _, process, _ in running.values():
                process.terminate()
            for _, process, _ in running.values():
                process.join()

    def _device(self, slot: int) -> int | None:
        return self.devices[slot % len(self.devices)] if self.devices else None


def _in_process(work: Work, task: Task, results: Connection, device: int | None) -> None:
    """Do a task in a process of its own, and send the result."""
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(device)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # What the task has started has to end with it: as an exception, so that it is told.
    signal.signal(signal.SIGTERM, _raise_interrupt)
    end_with_parent(signal.SIGTERM)
    try:
        results.send(attempt(work, task))
    except (KeyboardInterrupt, BrokenPipeError):  # the study is stopped, and says so itself
        sys.exit(1)


def _raise_interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _received(results: Connection, process: Any) -> Any:
    """Return what a process has sent; a process that ended without it is a `Failure`."""
    try:
        result = results.recv()
    except EOFError:
        process.join()
        return Failure(f"its process ended with status {process.exitcode}")
    process.join()
    return result


class Ray:
    """Ray Core: a task of one CPU, and a GPU each where there are some. Needs `pip install ray`.

    Args:
        workers: tasks at once; None for as many as the cluster has room for.
        address: of a cluster; None starts Ray on this machine.
        gpus: of a task.
    """

    def __init__(self, workers: int | None = None, address: str | None = None, gpus: float = 0):
        self.ray = _package("ray", "ray")
        self.workers, self.address, self.gpus = workers, address, gpus

    def run(self, work: Work, tasks: Iterator[Task]) -> Iterator[tuple[Task, Any]]:
        ray = self.ray
        local = {} if self.address else {"num_cpus": self.workers, "include_dashboard": False}
        ray.init(address=self.address, log_to_driver=False, **local)
        # A lost worker costs its task, which is done once more: what it had saved is still there.
        remote = ray.remote(num_cpus=1, num_gpus=self.gpus, max_retries=1)(attempt)
        running: dict[Any, Task] = {}
        try:
            room = self.workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
            while True:
                while len(running) < room and (task := next(tasks, None)) is not None:
                    running[remote.remote(work, task)] = task
                if not running:
                    return
                (done,), _ = ray.wait(list(running), num_returns=1)
                task = running.pop(done)
                try:
                    result = ray.get(done)
                except ray.exceptions.RayError as error:
                    result = Failure(f"lost: {type(error).__name__}")
                yield task, result
        finally:
            ray.shutdown()


class Submitit:
    """SLURM job arrays by submitit. Needs `pip install submitit`.

    Args:
        folder: where its logs and results go.
        workers: jobs of an array that run at once.
        cluster: `slurm`, or `local` for processes of this machine.
        parameters: of the executor, such as `slurm_partition`, `timeout_min`, `gpus_per_node`.
        in_rounds: submit only so many at once, for a searcher that learns from results.
    """

    def __init__(
        self,
        folder: Path,
        workers: int = 1,
        cluster: str | None = None,
        parameters: dict[str, object] | None = None,
        in_rounds: bool = False,
    ):
        submitit = _package("submitit", "submitit")
        self.executor = submitit.AutoExecutor(folder=folder / "%j", cluster=cluster)
        arrays = {"slurm_array_parallelism": workers} if cluster != "local" else {}
        try:
            self.executor.update_parameters(**arrays, **(parameters or {}))
        except (TypeError, ValueError, NameError) as error:
            raise UserError(f"--engine submitit: {error}") from error
        self.size = workers if in_rounds or cluster == "local" else None

    def run(self, work: Work, tasks: Iterator[Task]) -> Iterator[tuple[Task, Any]]:
        waiting: list[tuple[Any, Task]] = []
        try:
            while True:
                room = None if self.size is None else self.size - len(waiting)
                part: list[Task] = []
                while (room is None or len(part) < room) and (task := next(tasks, None)):
                    part.append(task)
                if part:
                    jobs = self.executor.map_array(attempt, [work] * len(part), part)
                    waiting += zip(jobs, part)
                if not waiting:
                    return
                ended = [pair for pair in waiting if pair[0].done()]
                for job, task in ended:
                    waiting.remove((job, task))
                    yield task, self._result(job)
                if not ended:
                    time.sleep(POLL)
        finally:
            for job, _ in waiting:
                job.cancel()

    @staticmethod
    def _result(job: Any) -> Any:
        error = job.exception()
        return job.result() if error is None else Failure(str(error).strip().splitlines()[-1])


def _package(name: str, install: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"--engine {name}: needs its package: pip install {install}") from error


def make_engine(
    name: str,
    workers: int,
    folder: Path,
    options: dict[str, Any],
    devices: list[int] | None = None,
    in_rounds: bool = False,
) -> Engine:
    """Return the engine of a name.

    Args:
        options: `address` and `gpus` of Ray; `cluster` and the executor's parameters of submitit.

    Raises:
        UserError: an unknown name or option, or a package that is not installed.
    """
    if workers < 1:
        raise UserError(f"--workers {workers}: expected 1 or more")
    given = dict(options)
    if name == "local":
        engine: Engine = Local(workers, devices)
    elif name == "ray":
        gpus = given.pop("gpus", 0)
        if isinstance(gpus, bool) or not isinstance(gpus, int | float) or gpus < 0:
            raise UserError(f"--engine_options gpus={gpus}: expected a number, 0 or more")
        engine = Ray(workers, given.pop("address", None), gpus)
    elif name == "submitit":
        engine = Submitit(folder, workers, given.pop("cluster", None), given, in_rounds)
        given = {}
    else:
        raise UserError(f"--engine {name}: accepted: local, ray, submitit")
    if given:
        raise UserError(f"--engine_options: unknown for {name}: {', '.join(given)}")
    return engine
