"""Signals that ask for the end, held while there is something to save."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def stop_on_signal() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT in a list, so that the loop can end between two steps."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    signals = (signal.SIGTERM, signal.SIGINT)
    before: dict[int, Any] = {
        s: signal.signal(s, lambda signum, _: received.append(signum)) for s in signals
    }
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
