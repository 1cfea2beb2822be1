"""TensorBoard summaries: scalars and images of a run."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from clu import asynclib
from etils import epath

from drl_jax.errors import as_user_error

if TYPE_CHECKING:
    from clu import metric_writers


class MetricWriter:
    """Writes summaries with CLU, in a background thread. Use it as a context manager.

    CLU imports TensorFlow, which takes seconds. The thread imports it when the first summary is
    written, so that the first training step does not have to wait.
    """

    def __init__(self, workdir: epath.Path | None):
        """Prepares a writer; no file is created until something is written.

        Args:
          workdir: folder of the event file; None: nothing is written. Of several processes,
            only the first may write.
        """
        self._workdir = workdir
        # A single worker, so that everything is written in order.
        self._pool = asynclib.Pool("metric_writer", max_workers=1)

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_: object) -> None:
        """Waits until everything is written.

        Raises:
          UserError: if something could not be written. The `write_` methods raise it too, for
            what was to be written before.
        """
        with self._writing():
            self._pool.close()

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Writes the values of scalars, by name, at a training step."""
        self._submit(lambda writer: writer.write_scalars(step, scalars))

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Writes images, by name, at a training step: uint8 arrays [n, H, W, C]."""
        self._submit(lambda writer: writer.write_images(step, images))

    def _submit(self, write: "Callable[[metric_writers.MetricWriter], None]") -> None:
        if self._workdir is None:
            return
        with self._writing():
            self._pool(lambda: write(self._writer))()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Re-raises what the thread raised as a `UserError`."""
        try:
            yield
        except asynclib.AsyncError as error:
            with as_user_error(f"cannot write TensorBoard files to {self._workdir}"):
                raise error.__cause__ or error from None

    @functools.cached_property
    def _writer(self) -> "metric_writers.MetricWriter":
        from clu import metric_writers

        return metric_writers.create_default_writer(str(self._workdir), asynchronous=False)
