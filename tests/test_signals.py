"""What signals do to a command, in a process that sends them to itself."""

import os
import signal
import time

import pytest

from ldm import signals
from ldm.commands import exit_status

STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGXCPU: 152}


@pytest.fixture(autouse=True)
def as_a_terminal_starts_it():
    """Not as nohup does, under which a hangup is ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def send(number):
    os.kill(os.getpid(), number)
    time.sleep(0.01)  # until Python has run the handler


@pytest.mark.parametrize("number", STATUS)
def test_a_stop_signal_ends_a_command_with_its_status(number, caplog):
    def command():
        send(number)
        pytest.fail("it went on")

    before = [signal.getsignal(each) for each in STATUS]
    assert exit_status(command) == STATUS[number]
    assert caplog.messages == [f"interrupted by {signal.Signals(number).name}"]
    assert [signal.getsignal(each) for each in STATUS] == before


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_save_signal_says_that_there_is_nothing_to_save(number, caplog):
    assert exit_status(lambda: send(number)) == 0
    assert f"{number.name}: no step is being trained" in caplog.text


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_patient_command_is_told_once_that_it_should_save(number):
    with signals.handled():
        signals.be_patient()
        send(number)
        assert signals.save_requested() and not signals.stop_requested()
        assert signals.take_save_request() and not signals.save_requested()


def test_a_patient_command_ends_when_it_asks(monkeypatch):
    monkeypatch.setattr(signals, "ONE_WISH", 0.0)
    with signals.handled():
        signals.be_patient()
        send(signal.SIGTERM)
        assert signals.stop_requested() == signal.SIGTERM
        with pytest.raises(signals.Interrupted) as found:
            send(signal.SIGINT)
        assert found.value.at_once and found.value.status == 143, "the first one counts"


def test_what_a_launcher_repeats_is_one_wish():
    with signals.handled():
        signals.be_patient()
        send(signal.SIGINT)
        send(signal.SIGINT)
        send(signal.SIGTERM)
        assert signals.stop_requested() == signal.SIGINT


def test_signals_that_come_while_a_program_is_imported_are_acted_on(caplog):
    signals.hold()
    send(signal.SIGUSR1)
    send(signal.SIGTERM)
    assert exit_status(lambda: pytest.fail("it began")) == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_hangup_under_nohup_is_survived():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert exit_status(lambda: send(signal.SIGHUP)) == 0


def test_a_worker_leaves_signals_to_the_process_that_started_it():
    with signals.handled():
        if (worker := os.fork()) == 0:
            send(signal.SIGINT)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == 7


@pytest.mark.parametrize("patient", [False, True])
def test_a_call_that_never_returns_does_not_keep_a_process_alive(tmp_path, monkeypatch, patient):
    """Such as one that waits for a process which is gone: no handler runs in it.

    A backward pass does return, so a patient command is ended by the second signal alone.
    """
    done, survived = tmp_path / "done", tmp_path / "survived"
    monkeypatch.setattr(signals, "STUCK", 0.2)
    monkeypatch.setattr(signals, "ONE_WISH", 0.1)
    if (worker := os.fork()) == 0:
        with signals.handled(), signals.last_act(done.touch):
            signals.be_patient(patient)
            signal.signal(signal.SIGTERM, lambda *_: None)  # as if the handler did not run
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5 if patient else 10)  # longer than one signal would take
            survived.touch()
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == 143
    assert done.exists() and survived.exists() is patient
