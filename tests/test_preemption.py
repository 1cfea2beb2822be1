import os
import signal
import threading
import time

import pytest

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


def test_a_hangup_that_is_ignored_stays_ignored():
    """As after nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with preemption.stop_on_signal() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop() is None
    finally:
        signal.signal(signal.SIGHUP, before)
