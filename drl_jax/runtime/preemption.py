"""Handles the signals of preemption, so that a run can save its state before it ends."""

import contextlib
import itertools
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

from drl_jax.errors import Interrupted

SIGNALLED = 128  # the exit status after a signal is this plus the number of the signal

# SIGHUP: the terminal has been closed; SIGUSR1: what clusters can send before the end of a job.
# Windows has neither.
NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")

REPEAT_AFTER = 0.5  # seconds until a signal whose exception was lost is sent again


def handled_signals() -> tuple[signal.Signals, ...]:
    """Returns the signals that stop a run.

    Those that are ignored, such as SIGHUP after nohup, are not among them.
    """
    present = [signal.Signals[name] for name in NAMES if name in signal.Signals.__members__]
    return tuple(signum for signum in present if signal.getsignal(signum) != signal.SIG_IGN)


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Callable[[], int | None]]:
    """Catches SIGTERM, SIGINT, SIGHUP and SIGUSR1, so that a loop can end between two steps.

    Yields a function that returns the number of the signal received, or None; call it before
    every step. If there are several processes, all must call it equally often: a signal to one
    of them is then returned in all of them, before the same step. Its number is always that of
    SIGTERM, the only signal that JAX's runtime forwards; the others are converted to it.

    Outside the main thread, Python cannot handle signals, and the function returns None.
    """
    import jax  # not at the top: the command line uses this module before it loads JAX
    from jax.experimental import multihost_utils

    signals = handled_signals()
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
    elif jax.process_count() > 1:
        others = [signum for signum in signals if signum != signal.SIGTERM]
        convert = dict.fromkeys(others, lambda *_: signal.raise_signal(signal.SIGTERM))
        with _signal_handlers(convert):
            step = itertools.count()
            yield (
                lambda: (
                    signal.SIGTERM
                    if multihost_utils.reached_preemption_sync_point(next(step))
                    else None
                )
            )
    else:
        received: list[int] = []
        collect = dict.fromkeys(signals, lambda signum, _: received.append(signum))
        with _signal_handlers(collect):
            yield lambda: received[0] if received else None


@contextlib.contextmanager
def reporting(report: str, has_others: bool) -> Iterator[None]:
    """Ends its body on one of `handled_signals`, and reports what is saved.

    Inner contexts of this kind and `stop_on_signal` take precedence.

    Args:
      report: what is saved, for the message of `Interrupted`.
      has_others: whether this is one of several processes. JAX's runtime then handles SIGTERM,
        and only Ctrl-C is reported here.

    Raises:
      Interrupted: if a signal has arrived.
    """
    # Python discards an exception that a handler raises during a callback, such as JAX's in
    # garbage collection. So the signal is sent again until the exception has arrived here.
    repeats: list[threading.Timer] = []
    has_arrived = False

    def stop(signum: int, _: object) -> None:
        if has_arrived:
            return
        repeats.append(threading.Timer(REPEAT_AFTER, signal.raise_signal, [signum]))
        repeats[-1].daemon = True
        repeats[-1].start()
        raise KeyboardInterrupt(signum)

    signals = {signal.SIGINT} if has_others else set(handled_signals())
    if threading.current_thread() is not threading.main_thread():
        signals = set()
    with _signal_handlers(dict.fromkeys(signals, stop)), _silently_discarded():
        try:
            yield
            if repeats:
                raise KeyboardInterrupt(*repeats[0].args)
        except KeyboardInterrupt as interrupt:
            has_arrived = True
            signum = interrupt.args[0] if interrupt.args else signal.SIGINT
            raise Interrupted(signum, report) from None
        finally:
            for repeat in repeats:
                repeat.cancel()


def leave(status: int) -> NoReturn:
    """Ends the program with an exit status.

    If a signal has stopped it, JAX may still be computing in other threads, which can crash
    Python's shutdown. So the process then ends without it; all files have been written.
    """
    if status > SIGNALLED:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


@contextlib.contextmanager
def _signal_handlers(handlers: Mapping[Any, Any]) -> Iterator[None]:
    """Installs signal handlers, and restores the previous ones at exit."""
    before = {signum: signal.signal(signum, handler) for signum, handler in handlers.items()}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextlib.contextmanager
def _silently_discarded() -> Iterator[None]:
    """Keeps Python from printing a KeyboardInterrupt that it discards."""
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if not isinstance(unraisable.exc_value, KeyboardInterrupt):
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before
