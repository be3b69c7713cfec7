"""Stop signals: what Ctrl-C, SIGTERM and others do to a command, whatever it is doing then.

A stop signal raises `Interrupted`, unless someone has said that the command should be patient: then
it is noted, and whoever asks after each step ends the command when a step is whole.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import FrameType

log = logging.getLogger(__name__)


def _known(*names: str) -> list[signal.Signals]:
    """Return the signals of these names that the system has; Windows lacks most."""
    return [getattr(signal, name) for name in names if hasattr(signal, name)]


# SIGINT is Ctrl-C. `kill`, `docker stop` and schedulers send SIGTERM, a terminal that closes
# SIGHUP, and a limit of processor time SIGXCPU.
STOPS = _known("SIGINT", "SIGTERM", "SIGHUP", "SIGXCPU")
# Schedulers send one of these some time before they kill a job; both kill what does not expect
# them.
SAVES = _known("SIGUSR1", "SIGUSR2")

# A launcher sends its processes again what the terminal has sent to all: this is one wish, not two.
ONE_WISH = 1.0  # seconds
# Python runs handlers between two of its own instructions. A call into a library that waits for
# another process may never come back to them.
STUCK = 5.0  # seconds


class Interrupted(BaseException):
    """A stop signal ends the command.

    It is no `Exception`, so that no code on its way takes it for a fault to go on from.

    Attributes:
        number: the signal.
        at_once: whether it was the second one, after which nothing more is written.
        advice: what is saved and what to do next, for the message; whoever knows it sets it.
    """

    def __init__(self, number: int, at_once: bool = False):
        super().__init__(number)
        self.number, self.at_once = number, at_once
        self.advice = ""

    @property
    def status(self) -> int:
        """Return the exit status of a program that this signal ended, as shells have it."""
        return 128 + self.number

    def __str__(self) -> str:
        text = f"interrupted by {signal.Signals(self.number).name}"
        return f"{text}; {self.advice}" if self.advice else text


@dataclass
class _State:
    """What this process has received since its handlers were set."""

    process: int = 0  # workers inherit the handlers, but are ended by the process that started them
    previous: dict[int, Any] = field(default_factory=dict)
    holding: bool = False
    patient: bool = False
    deaf: bool = False
    stop: int = 0
    stopped_at: float = 0.0
    heard_at: float = 0.0
    save: int = 0  # the signal that asks to save, 0 for none
    last_acts: list[Callable[[], object]] = field(default_factory=list)


_state = _State()


def hold() -> None:
    """Note signals from now on instead of ending by them, until `handled` acts on them.

    For the first lines of a program, before it has imported what handles errors.
    """
    if _in_main_thread() and not _state.previous:
        _install()
        _state.holding = True


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Turn stop signals into `Interrupted` inside, and survive those that ask to save.

    Inside another `handled`, or in a thread, this does nothing.
    """
    inside = _state.process == os.getpid() and bool(_state.previous) and not _state.holding
    if inside or not _in_main_thread():
        yield
        return
    if not _state.holding:
        _install()
    try:
        with _watching():
            yield
    finally:
        _restore()


def act_on_held() -> None:
    """Run what the signals ask for that came since `hold`.

    Raises:
        Interrupted: one of them was a stop signal.
    """
    if not _state.holding:
        return
    _state.holding = False
    if _state.stop:
        raise Interrupted(_state.stop)
    if _state.save:
        _say_nothing_to_save(_state.save)
        take_save_request()


def be_patient(patient: bool = True) -> None:
    """Note the first stop signal, and one that asks to save, without acting on them.

    `stop_requested` returns what was noted; the caller asks it after each step.
    """
    _state.patient = patient


def be_deaf() -> None:
    """Ignore further signals: the command is ending because of one."""
    _state.deaf = True


def stop_requested() -> int:
    """Return the number of the stop signal that was received, or 0."""
    return _state.stop


def save_requested() -> bool:
    """Return whether a signal asked to save since `take_save_request`."""
    return bool(_state.save)


def take_save_request() -> bool:
    """Return whether a signal asked to save since this was last called."""
    requested, _state.save = _state.save, 0
    return bool(requested)


@contextlib.contextmanager
def last_act(act: Callable[[], object]) -> Iterator[None]:
    """Call `act` if a signal has to end the process inside, from a thread, while the main one is
    stuck.
    """
    _state.last_acts.append(act)
    try:
        yield
    finally:
        if act in _state.last_acts:
            _state.last_acts.remove(act)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _install() -> None:
    _state.process = os.getpid()
    for number in STOPS:
        # Under nohup a closing terminal is meant to be survived.
        ignored = signal.getsignal(number) == signal.SIG_IGN
        if not (ignored and number == getattr(signal, "SIGHUP", None)):
            _state.previous[number] = signal.signal(number, _on_stop)
    for number in SAVES:
        _state.previous[number] = signal.signal(number, _on_save)


def _restore() -> None:
    global _state
    previous, _state = _state.previous, _State()
    for number, handler in previous.items():
        signal.signal(number, handler)


def _on_stop(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _state.process:
        return
    now = _state.heard_at = time.monotonic()
    again = bool(_state.stop)
    if _state.deaf or (again and now - _state.stopped_at < ONE_WISH):
        return
    _state.stop, _state.stopped_at = _state.stop or number, now
    if _state.holding:
        return
    if again or not _state.patient:
        raise Interrupted(_state.stop, at_once=again)
    name = signal.Signals(number).name
    log.warning("%s: finishing this step and saving it (once more stops at once)", name)


def _on_save(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _state.process or _state.deaf:
        return
    if _state.patient or _state.holding:
        _state.save = number
    else:
        _say_nothing_to_save(number)


def _say_nothing_to_save(number: int) -> None:
    name = signal.Signals(number).name
    log.warning("%s: no step is being trained, so there is nothing to save; going on", name)


# The main thread may be stuck


@contextlib.contextmanager
def _watching() -> Iterator[None]:
    """Start a thread that sees the stop signals, too.

    It ends the process where the main thread cannot.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(read,), name="signals", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(write)  # ends the thread
        watcher.join()


def _watch(read: int) -> None:
    first, pending = 0.0, deque[tuple[int, float]]()  # stop signals, and when they came
    with open(read, "rb", buffering=0) as numbers:
        while True:
            left = max(0.0, pending[0][1] + STUCK - time.monotonic()) if pending else None
            ready, _, _ = select.select([read], [], [], left)
            if ready:
                byte = numbers.read(1)
                if not byte:
                    return
                if byte[0] in STOPS:
                    pending.append((byte[0], time.monotonic()))
                    first = first or pending[0][1]
                continue
            # The main thread had its time. The backward pass of a large model is one long call:
            # only a second signal ends it, of which no handler has heard either.
            number, arrived = pending.popleft()
            again = arrived - first >= ONE_WISH
            if _state.heard_at < arrived - ONE_WISH and (again or not _state.patient):
                _end_stuck_process(number)


def _end_stuck_process(number: int) -> None:
    log.error("%s", Interrupted(number))
    for act in reversed(_state.last_acts):
        with contextlib.suppress(Exception):
            act()
    logging.shutdown()
    os._exit(128 + number)


def _forget_watcher() -> None:
    """Keep the signals of a forked worker out of the pipe of the process that started it."""
    if _state.previous:
        signal.set_wakeup_fd(-1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_watcher)
