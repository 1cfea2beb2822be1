"""How far long work is: a bar on a terminal, plain lines in a log."""

import logging
import time
from typing import Any

import jax
from tqdm import tqdm

log = logging.getLogger(__name__)

SILENCE = 30.0  # seconds after which a log without a bar hears of it


def bar(**settings: Any) -> tqdm:
    """Returns tqdm's bar: on a terminal, and of several processes the first one's alone."""
    return tqdm(disable=True if jax.process_index() else None, **settings)


class Progress:
    """A count of things done, shown while it is open."""

    def __init__(self, total: int, unit: str):
        """Counts to `total`; the unit is a word such as 'step'."""
        self._bar = bar(total=total, unit=unit)
        self._done, self._total, self._unit = 0, total, unit
        self._told = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, number: int) -> None:
        """Takes in that so many more are done."""
        self._done += number
        self._bar.update(number)
        if self._bar.disable and time.monotonic() - self._told > SILENCE:
            log.info("%d of %d %ss", self._done, self._total, self._unit)
            self._told = time.monotonic()
