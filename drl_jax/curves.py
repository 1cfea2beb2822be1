"""The curves and pictures of a run, for TensorBoard."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from clu import asynclib
from etils import epath


class Curves:
    """Writes through clu, in a thread, what it is given while it is open.

    clu needs TensorFlow, seconds of loading: the thread loads it when there is something to
    write, so that no first training step waits for it.
    """

    def __init__(self, workdir: epath.Path, just_logging: bool = False):
        """Opens a file in the work directory, or none where another process has one."""
        self._opens = str(workdir), just_logging
        self._writer: Any = None
        self._thread = asynclib.Pool("curves", max_workers=1)  # one: all stays in order
        self._do = self._thread(self._write)

    def __enter__(self) -> "Curves":
        return self

    def __exit__(self, *_: object) -> None:
        """Waits until all is written.

        Raises:
          asynclib.AsyncError: if something could not be; so may the next call of a method.
        """
        self._thread(self._close)()
        self._thread.close()

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Adds a point to every curve."""
        self._do("write_scalars", step, scalars)

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Adds pictures, uint8 [number, height, width, channels]."""
        self._do("write_images", step, images)

    def _write(self, method: str, *values: Any) -> None:
        if self._writer is None:
            from clu import metric_writers

            workdir, just_logging = self._opens
            self._writer = metric_writers.create_default_writer(
                workdir, just_logging=just_logging, asynchronous=False
            )
        getattr(self._writer, method)(*values)

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
