"""Shows the progress of long computations: a bar on a terminal, lines in a log."""

import logging
import time
from typing import Any

import jax
from tqdm import tqdm

log = logging.getLogger(__name__)

LOG_INTERVAL = 30.0  # shortest time between two lines of the log [seconds]


def bar(**settings: Any) -> tqdm:
    """Returns a tqdm bar, shown only on a terminal and only by process 0.

    Args:
      settings: arguments of `tqdm.tqdm`.
    """
    return tqdm(disable=True if jax.process_index() else None, **settings)


def duration(seconds: float) -> str:
    """Returns a duration as HH:MM:SS, with the number of days before it if there are any."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days} d " * bool(days) + f"{hours:02d}:{minutes:02d}:{seconds:02d}"


class Progress:
    """Counts and shows finished work. Use it as a context manager.

    Without a bar, it logs a line at most every `LOG_INTERVAL` seconds.
    """

    def __init__(self, total: int, unit: str):
        """Starts at 0.

        Args:
          total: number of units of work.
          unit: name of one unit, in the singular, such as 'step'.
        """
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
