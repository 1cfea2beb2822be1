"""TensorBoard summaries: scalars, images and texts of a run."""

import functools
import importlib.util
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

import numpy as np
from etils import epath

log = logging.getLogger(__name__)


@runtime_checkable
class Writer(Protocol):
    """The methods of `clu.metric_writers.MetricWriter` that are used here."""

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Writes the values of scalars, by name, at a training step."""

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Writes images, by name, at a training step: uint8 arrays [n, H, W, C]."""

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Writes texts in Markdown, by name, at a training step."""

    def close(self) -> None:
        """Writes what has not been written, and closes the file."""


class TensorboardX:
    """A `Writer` that needs no TensorFlow.

    Unlike `tensorboardX.SummaryWriter`, it has no thread of its own, so that errors reach the
    caller.
    """

    def __init__(self, workdir: str):
        """Opens an event file in a folder.

        Raises:
          OSError: if the file cannot be created.
        """
        # Not imported where TensorFlow is installed.
        from tensorboardX import event_file_writer, record_writer

        record_writer.directory_check(workdir)
        self._events = event_file_writer.EventsWriter(str(epath.Path(workdir) / "events"))

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Writes the values of scalars, by name, at a training step."""
        from tensorboardX import summary

        for name, value in scalars.items():
            self._write(step, summary.scalar(name, float(value)))

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Writes images, by name, at a training step: uint8 arrays [n, H, W, C]."""
        from tensorboardX import summary

        for name, image in images.items():
            self._write(step, summary.image(name, image, dataformats="NHWC"))

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Writes texts in Markdown, by name, at a training step."""
        from tensorboardX import summary

        for name, text in texts.items():
            self._write(step, summary.text(name, text))

    def _write(self, step: int, summary: Any) -> None:
        from tensorboardX.proto import event_pb2

        event = event_pb2.Event(wall_time=time.time(), step=step, summary=summary)
        self._events.write_event(event)
        self._events.flush()

    def close(self) -> None:
        """Writes what has not been written, and closes the file."""
        self._events.close()


def open_writer(workdir: str) -> Writer:
    """Opens an event file in a folder, with CLU if TensorFlow is installed.

    Raises:
      OSError: if the file cannot be created.
    """
    if importlib.util.find_spec("tensorflow") is None:
        return TensorboardX(workdir)
    from clu import metric_writers  # imports TensorFlow, which takes seconds

    return metric_writers.create_default_writer(workdir, asynchronous=False)


class MetricWriter:
    """Writes summaries in a background thread. Use it as a context manager.

    If a file cannot be written, for example because the disk is full, one line of the log says
    so, and nothing more is written: curves must not end a training run.

    Where TensorFlow is installed, it writes with CLU, which imports TensorFlow; elsewhere with
    tensorboardX. The thread imports the library when the first summary is written, so that the
    first training step does not have to wait.
    """

    def __init__(
        self, workdir: epath.Path | None, open_file: Callable[[str], Writer] = open_writer
    ):
        """Prepares a writer; no file is created until something is written.

        Args:
          workdir: folder of the event file; None: nothing is written. Of several processes,
            only the first may write.
          open_file: opens an event file in a folder.
        """
        self._workdir = workdir
        self._open_file = open_file
        # A single worker, so that everything is written in order.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="metric_writer")

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_: object) -> None:
        """Waits until everything is written."""
        self._pool.submit(self._close)
        self._pool.shutdown()

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Writes the values of scalars, by name, at a training step."""
        self._submit(lambda writer: writer.write_scalars(step, scalars))

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Writes images, by name, at a training step: uint8 arrays [n, H, W, C]."""
        self._submit(lambda writer: writer.write_images(step, images))

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Writes texts in Markdown, by name, at a training step."""
        self._submit(lambda writer: writer.write_texts(step, texts))

    def _submit(self, write: Callable[[Writer], None]) -> None:
        self._pool.submit(self._write, write)

    def _write(self, write: Callable[[Writer], None]) -> None:
        """Writes in the thread. After a failure, which is logged, nothing more is written."""
        if self._workdir is None:
            return
        try:
            write(self._writer)
        except Exception as error:  # disks raise OSError, TensorFlow its own errors
            # TensorFlow's message begins with the operation and the path, and has many lines.
            reason = str(error).partition("\n")[0].rpartition("; ")[2]
            log.warning(
                "cannot write TensorBoard files to %s (%s): continuing without them",
                self._workdir,
                getattr(error, "strerror", None) or reason,
            )
            self._workdir = None

    def _close(self) -> None:
        if "_writer" in vars(self):  # `cached_property` has opened a file
            self._write(lambda writer: writer.close())

    @functools.cached_property
    def _writer(self) -> Writer:
        return self._open_file(str(self._workdir))
