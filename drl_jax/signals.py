"""Signals that ask for the end, held while there is something to save."""

import contextlib
import itertools
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Callable[[], int | None]]:
    """Holds SIGTERM and SIGINT, so that a loop can end between two steps.

    Gives a function that tells the signal that has come, or None. Of several processes each
    must ask before every step: one that is signalled is enough, and all hear of it before the
    same step. They hear of SIGTERM, which JAX's runtime passes on; SIGINT becomes it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
    elif jax.process_count() > 1:
        with _handled({signal.SIGINT: lambda *_: signal.raise_signal(signal.SIGTERM)}):
            count = itertools.count()
            yield (
                lambda: (
                    signal.SIGTERM
                    if multihost_utils.reached_preemption_sync_point(next(count))
                    else None
                )
            )
    else:
        received: list[int] = []
        collect = dict.fromkeys(
            (signal.SIGTERM, signal.SIGINT), lambda signum, _: received.append(signum)
        )
        with _handled(collect):
            yield lambda: received[0] if received else None


@contextlib.contextmanager
def _handled(handlers: Mapping[Any, Any]) -> Iterator[None]:
    """Has these handlers called, and inside only."""
    before = {signum: signal.signal(signum, handler) for signum, handler in handlers.items()}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
