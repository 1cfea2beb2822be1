"""The curves and pictures of a run, for TensorBoard."""

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from clu import asynclib
from etils import epath

if TYPE_CHECKING:
    from clu.metric_writers import MetricWriter


class Curves:
    """Writes through clu, in a thread, what it is given while it is open.

    clu needs TensorFlow, seconds of loading: the thread loads it when there is something to
    write, so that no first training step waits for it.
    """

    def __init__(self, workdir: epath.Path, just_logging: bool = False):
        """Writes to a file in the work directory, or to none where another process does."""
        self._workdir, self._just_logging = workdir, just_logging
        self._thread = asynclib.Pool("curves", max_workers=1)  # one: all stays in order

    def __enter__(self) -> "Curves":
        return self

    def __exit__(self, *_: object) -> None:
        """Waits until all is written.

        Raises:
          asynclib.AsyncError: if something could not be; so may the next call of a method.
        """
        self._thread.close()

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Adds a point to every curve."""
        self._do(lambda writer: writer.write_scalars(step, scalars))

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Adds pictures, uint8 [number, height, width, channels]."""
        self._do(lambda writer: writer.write_images(step, images))

    def _do(self, write: "Callable[[MetricWriter], None]") -> None:
        self._thread(lambda: write(self._writer))()

    @functools.cached_property
    def _writer(self) -> "MetricWriter":
        from clu import metric_writers

        return metric_writers.create_default_writer(
            str(self._workdir), just_logging=self._just_logging, asynchronous=False
        )
