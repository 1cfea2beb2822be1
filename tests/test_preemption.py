import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from drl_jax.errors import Interrupted
from drl_jax.runtime import preemption


@pytest.mark.parametrize(
    "signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1]
)
def test_a_signal_is_reported_and_its_handler_restored(signum):
    before = signal.getsignal(signum)
    with preemption.stop_on_signal() as stop:
        assert stop() is None
        os.kill(os.getpid(), signum)
        end = time.monotonic() + 10
        while not stop() and time.monotonic() < end:
            time.sleep(0.001)
        assert stop() == signum
    assert signal.getsignal(signum) is before


def test_the_first_of_two_signals_counts():
    with preemption.stop_on_signal() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert stop() == signal.SIGINT


def test_handlers_are_restored_after_an_exception():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError), preemption.stop_on_signal():
        raise RuntimeError
    assert signal.getsignal(signal.SIGTERM) is before


def test_outside_the_main_thread_no_signal_is_reported():
    found = []

    def run():
        with preemption.stop_on_signal() as stop:
            found.append(stop())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [None]


@pytest.mark.parametrize(
    ("signum", "has_others"), [(15, False), (1, False), (2, False), (2, True)]
)
def test_a_signal_ends_the_body_with_a_report(signum, has_others):
    before = signal.getsignal(signal.SIGTERM)
    with (
        pytest.raises(Interrupted, match=rf"^stopped by signal {signum}; all is sav") as found,
        preemption.reporting("all is saved", has_others),
    ):
        signal.raise_signal(signum)
    assert found.value.signum == signum
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_inner_report_is_the_one_that_counts():
    with (
        pytest.raises(Interrupted, match=r"; the samples are saved$"),
        preemption.reporting("nothing is saved", has_others=False),
        preemption.reporting("the samples are saved", has_others=False),
    ):
        signal.raise_signal(signal.SIGTERM)


def test_among_several_processes_sigterm_is_left_to_jax():
    before = signal.getsignal(signal.SIGTERM)
    with preemption.reporting("nothing is saved", has_others=True):
        assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_is_ignored_stays_ignored(signum):
    """As SIGHUP is after nohup, and SIGINT in a shell's background."""
    before = signal.signal(signum, signal.SIG_IGN)
    try:
        with preemption.stop_on_signal() as stop, preemption.reporting("none", False):
            signal.raise_signal(signum)
            assert stop() is None
    finally:
        signal.signal(signum, before)


@contextlib.contextmanager
def in_garbage_collection(function):
    """Calls a function in a callback of the garbage collection, which discards exceptions."""

    def callback(*_):
        gc.callbacks.remove(callback)  # called once
        function()

    gc.callbacks.append(callback)
    yield


@pytest.mark.parametrize("seconds", [0, 10])
def test_a_signal_whose_exception_is_discarded_still_ends_the_body(seconds, monkeypatch):
    """Whether the body goes on for long or ends before the signal is repeated."""
    printed = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)

    def body():
        with in_garbage_collection(lambda: signal.raise_signal(signal.SIGTERM)):
            gc.collect()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.01)

    start = time.monotonic()
    with (
        pytest.raises(Interrupted, match=r"^stopped by signal 15; all is saved$"),
        preemption.reporting("all is saved", has_others=False),
    ):
        body()
    assert time.monotonic() - start < 5
    time.sleep(2 * preemption.REPEAT_AFTER)  # it is not repeated after the report
    assert printed == []


def test_other_exceptions_that_python_discards_are_printed(monkeypatch):
    printed = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)

    def fail():
        raise ValueError

    with preemption.reporting("all is saved", has_others=False), in_garbage_collection(fail):
        gc.collect()
    assert [type(unraisable.exc_value) for unraisable in printed] == [ValueError]
    assert sys.unraisablehook == printed.append


@pytest.mark.parametrize(("status", "ending"), [(0, "end"), (1, "end"), (143, "")])
def test_after_a_signal_python_does_not_shut_down(status, ending):
    """JAX's threads could crash that. What has been printed is not lost."""
    program = (
        "import atexit; from drl_jax.runtime import preemption\n"
        "atexit.register(print, 'end', end='')\n"
        f"print('printed', end=' ')\npreemption.leave({status})"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (status, f"printed {ending}")
