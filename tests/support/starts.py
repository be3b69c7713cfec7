"""The training command in processes of their own, which may be killed: forked where all is
imported, or anew.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

import main
from tests.support import stops
from tests.support.processors import THREADS

# What a start imports, imported once for all that are forked.
IMPORTS = """
    tests.support.starts pytest ldm.training.train ldm.models.diffusion.ddpm ldm.models.autoencoder ldm.optim.schedules
    ldm.modules.encoders.modules ldm.modules.losses.contperceptual ldm.data.personalized ldm.callbacks.non_finite
    ldm.callbacks.first_step ldm.callbacks.progress ldm.optim.in_backward open_clip torchvision
    transformers.models.clip.modeling_clip torch.utils.tensorboard torch.distributed.checkpoint.state_dict
    peft tests.support.warm
"""
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(IMPORTS.split())
ANEW = bool(os.environ.get("ANEW"))
KILL_AT = "TEST_KILL_AT"  # place:step, of `Killer`
KILLER = "lightning.callbacks.killer.target=tests.support.starts.Killer"
SPY = "lightning.callbacks.spy.target=tests.support.starts.Spy"
DEADLINE = 300  # seconds


def forked(
    arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> ForkServerProcess:
    """A start as a copy of a process that has imported everything and computed nothing; it writes
    to `log`.
    """
    process = CONTEXT.Process(target=_start, args=(list(arguments), log, dict(environment or {})))
    process.start()
    return process


def _start(arguments: list[str], log: Path, environment: dict[str, str]) -> None:
    output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, sys.stdout.fileno())
    os.dup2(output, sys.stderr.fileno())
    os.environ.update({"CUDA_VISIBLE_DEVICES": "", **environment})
    torch.set_num_threads(int(THREADS))
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup would have ignored
    # Lightning starts the other processes by the command that it reads here.
    sys.argv = [main.__file__, *arguments]
    with stops.armed():
        sys.exit(main.main(arguments))


class Anew:
    """A start as `python main.py`, with the interface of a forked one."""

    def __init__(
        self, arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
    ):
        command = [sys.executable, str(Path(main.__file__)), *arguments]
        environment = {
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": THREADS,
            **(environment or {}),
        }
        with open(log, "a") as output:
            self._process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        self.kill, self.join, self.pid = self._process.kill, self._process.wait, self._process.pid

    def is_alive(self) -> bool:
        return self._process.poll() is None

    @property
    def exitcode(self) -> int | None:
        return self._process.poll()


def begin(
    arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> ForkServerProcess | Anew:
    """A start, as `python main.py` where the variable ANEW asks for that."""
    return (Anew if ANEW else forked)(arguments, log, environment)


def run_to_end(
    arguments: Sequence[str],
    log: Path,
    environment: Mapping[str, str] | None = None,
    status: int = 0,
) -> None:
    """Wait for a start to end with `status`, which is minus the number of a signal that killed
    it.
    """
    process = begin(arguments, log, environment)
    try:
        process.join(DEADLINE)
        assert process.exitcode == status, (
            f"{process.exitcode} instead of {status}: {log.read_text()[-3000:]}"
        )
    finally:
        process.kill()


def kill_now() -> None:
    """End this process as a crash would: nothing is flushed and no handler runs."""
    os.kill(os.getpid(), signal.SIGKILL)


class Killer(pl.Callback):
    """Kills its process where TEST_KILL_AT says: `start:10`, with 10 steps done, or in another
    place of that step.

    `backward` is after the gradients of a batch, `checkpoint` when the file of this step is there
    and `last.ckpt` is not, `last` when that is there, too.
    """

    def __init__(self) -> None:
        place, _, step = os.environ.get(KILL_AT, "never:0").partition(":")
        self.place, self.step = place, int(step)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.place not in ("checkpoint", "last"):
            return
        replace, name = (
            os.replace,
            "last.ckpt" if self.place == "last" else f"step={self.step:09}.ckpt",
        )

        def replace_and_die(source: Any, target: Any) -> None:
            replace(source, target)
            if trainer.global_step == self.step and str(target).endswith(name):
                kill_now()

        os.replace = replace_and_die  # type: ignore[assignment]

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._at("start", trainer)

    def on_after_backward(self, trainer: pl.Trainer, *_: Any) -> None:
        self._at("backward", trainer)

    def _at(self, place: str, trainer: pl.Trainer) -> None:
        if place == self.place and trainer.global_step == self.step:
            kill_now()


class Spy(pl.Callback):
    """Writes each rank's weights at the end, with how often the gradients and decisions were shared
    before.
    """

    def __init__(self) -> None:
        self.counts = {"gradients": 0, "decisions": 0}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        decide = trainer.strategy.reduce_boolean_decision

        def counted_decision(*args: Any, **kwargs: Any) -> bool:
            self.counts["decisions"] += 1
            return decide(*args, **kwargs)

        def counted_hook(state, bucket):  # type: ignore[no-untyped-def] # torch checks annotations
            self.counts["gradients"] += bucket.is_last()
            return allreduce_hook(state, bucket)

        trainer.strategy.reduce_boolean_decision = counted_decision  # type: ignore[method-assign]
        trainer.strategy.model.register_comm_hook(None, counted_hook)  # type: ignore[union-attr, operator]

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        found = {"weights": pl_module.state_dict(), "counts": self.counts}
        torch.save(found, Path(os.environ["TEST_SPY"]) / f"rank{trainer.global_rank}.pt")
