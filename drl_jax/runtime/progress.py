"""Shows the progress of long computations: a bar on a terminal, lines in a log."""

import logging
import time
from typing import Any

import jax
from tqdm import tqdm

log = logging.getLogger(__name__)

LOG_INTERVAL = 30.0  # shortest time between two lines [seconds]


def bar(**settings: Any) -> tqdm:
    """Returns a tqdm bar, shown only on a terminal and only by the first process."""
    return tqdm(disable=True if jax.process_index() else None, **settings)


class Progress:
    """Counts finished work and shows it, as a context manager."""

    def __init__(self, total: int, unit: str):
        """Counts to `total`; `unit` is a noun in the singular, such as 'step'."""
        self._bar = bar(total=total, unit=unit)
        self._done, self._total, self._unit = 0, total, unit
        self._last_logged = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, number: int) -> None:
        """Counts `number` more units as done."""
        self._done += number
        self._bar.update(number)
        if self._bar.disable and time.monotonic() - self._last_logged > LOG_INTERVAL:
            log.info("%d of %d %ss", self._done, self._total, self._unit)
            self._last_logged = time.monotonic()
