"""This machine: its devices, its precision, the memory that it keeps."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import platform
import re
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ldm.errors import UserError

log = logging.getLogger(__name__)

CPU_INFO = Path("/proc/cpuinfo")
CUDA = "cuda"  # the one place where the library spells a device that may not be there
BF16_FLAGS = {"avx512_bf16", "amx_bf16"}


def accelerators() -> tuple[str, int]:
    """Return the accelerator that this machine has, in Lightning's word for it, and how many."""
    import torch  # takes seconds, which `--help` need not wait for

    if torch.cuda.is_available():
        return "gpu", torch.cuda.device_count()
    if torch.backends.mps.is_available():
        return "mps", 1
    return "cpu", 0


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error is of torch's allocators, on a GPU or the CPU, or of Python's."""
    # By name: a command that has not imported torch needs no import of it to end.
    names = {kind.__name__ for kind in type(error).__mro__}
    on_cpu = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return on_cpu or not names.isdisjoint({"OutOfMemoryError", "MemoryError"})


def default_precision(accelerator: str) -> str:
    """Return bfloat16 autocast where the device computes in it, else float32.

    Weights and optimizer stay in float32.

    Args:
        accelerator: Lightning's word for it.
    """
    import torch  # takes seconds, which `--help` need not wait for

    kind = accelerators()[0] if accelerator == "auto" else accelerator
    if kind in ("gpu", CUDA) and torch.cuda.is_available():
        return (
            "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
        )
    return "bf16-mixed" if kind == "cpu" and BF16_FLAGS & _cpu_flags() else "32-true"


@functools.cache
def onednn_is_faster() -> bool:
    """Return whether oneDNN multiplies matrices of float32 faster than MKL, which torch takes.

    MKL uses AVX512 on Intel's processors alone.
    """
    import torch

    try:
        is_amd = "AuthenticAMD" in CPU_INFO.read_text()
    except OSError:
        return False
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return is_amd and wide and torch.backends.mkldnn.is_available()


def _cpu_flags() -> set[str]:
    """Return what the processor says that it can, where the system says it."""
    try:
        lines = CPU_INFO.read_text().splitlines()
    except OSError:
        return set()
    return next(
        (set(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), set()
    )


def parse_gpus(text: str) -> dict[str, Any]:
    """Return Trainer arguments for a `--gpus` value.

    `0,` and `0,1` list indices; a bare `1` or `2` is a count. `0` is the CPU, as it was in
    Lightning 1. On a machine without a GPU a request for just the first one runs on the CPU, with a
    warning.

    Raises:
        UserError: a value that is no such list, or names a GPU that is not there.
    """
    if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*,?\s*", text):
        raise UserError(f"--gpus {text}: expected a list such as '0,' or '0,1', or a count")
    numbers = [int(number) for number in text.split(",") if number.strip()]
    wanted = numbers if "," in text else list(range(numbers[0]))
    kind, available = accelerators()
    if not wanted:
        log.info("--gpus %s: no GPU: training on the CPU (write '0,' for the first GPU)", text)
        return {"accelerator": "cpu", "devices": 1}
    if not available and wanted == [0]:
        log.warning("--gpus %s: this machine has no GPU: training on the CPU", text)
        return {"accelerator": "cpu", "devices": 1}
    missing = [index for index in wanted if index >= available]
    if missing:
        there = f"GPUs 0 to {available - 1}" if available else "no GPU"
        raise UserError(f"--gpus {text}: there is no GPU {missing[0]}: this machine has {there}")
    if len(set(wanted)) != len(wanted):
        raise UserError(f"--gpus {text}: a GPU is named twice")
    log.info("--gpus %s: training on %s %s", text, kind, ", ".join(map(str, wanted)))
    return {"accelerator": kind, "devices": wanted if kind == "gpu" else 1}


# Memory

# Parameters of mallopt(3), and the value that switches trimming off.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, NEVER = -1, -3, -1


LARGEST = 2**30  # bytes that are taken from the heap, not mapped


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for the next allocation, for the rest of this process.

    Returns False where the C library is not glibc. By default glibc maps each large block anew, and
    the system fills it with zeros page by page: of a full-size training step that is about a third
    of the time.
    """
    libc = _glibc()
    if libc is None:
        return False
    libc.malloc_trim(0)
    return bool(libc.mallopt(M_MMAP_THRESHOLD, LARGEST) and libc.mallopt(M_TRIM_THRESHOLD, NEVER))


def give_back_free_pages() -> bool:
    """Give the system the pages of the heap in which nothing lies now, kept or not; False where it
    is not glibc.
    """
    libc = _glibc()
    return libc is not None and bool(libc.malloc_trim(0))


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
HUGE_PAGES_VARIABLE = "THP_MEM_ALLOC_ENABLE"  # torch's, for tensors of 2 MB and more


def huge_pages_environment(config: Mapping[str, object]) -> dict[str, str]:
    """Return the variables to start a training with: none where it gives memory back between steps.

    The system fills huge pages in a fraction of the time of small ones.
    """
    lightning = config.get("lightning")  # of a config that nothing has checked
    callbacks = lightning.get("callbacks") if isinstance(lightning, Mapping) else None
    given_back = isinstance(callbacks, Mapping) and callbacks.get("host_memory", True) is None
    return {HUGE_PAGES_VARIABLE: "1"} if HUGE_PAGES.exists() and not given_back else {}


@contextmanager
def environment_with(variables: Mapping[str, str]) -> Iterator[None]:
    """Give the process and those that it starts these variables inside, beside their own, which go
    first.
    """
    new = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            del os.environ[name]


def end_with_parent(number: int = signal.SIGKILL) -> None:
    """Let Linux end this process when the one that started it ends, whatever ends that one.

    A process of a group would wait half an hour for one that is gone.

    Args:
        number: the signal that ends it.
    """
    pr_set_pdeathsig = 1  # of prctl(2)
    libc = _glibc()
    if libc is not None and platform.system() == "Linux":
        libc.prctl(pr_set_pdeathsig, number)


PACKAGES = ("torch", "pytorch-lightning", "transformers", "numpy", "pillow")


def environment() -> dict[str, str]:
    """Return what numbers may depend on beside the settings: processor, threads, versions."""
    import torch

    from ldm import __version__

    found = {"processor": cpu_model(), "threads": str(torch.get_num_threads())}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    found |= _versions()
    return {**found, "python": platform.python_version(), "dreambooth-ldm": __version__}


@functools.cache
def _versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}


@functools.cache
def cpu_model() -> str:
    """Return the processor's name, with its instruction set."""
    import torch

    if not CPU_INFO.exists():
        return platform.processor() or platform.machine()
    lines = CPU_INFO.read_text().splitlines()
    name = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), ""
    )
    return f"{name or platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"
