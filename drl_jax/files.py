"""Writing to folders that others may look at, or that may not be writable.

Of several processes only the first one writes: the folder is the same for all.
"""

import contextlib
import io
import os
from collections.abc import Iterator
from typing import Any, BinaryIO

import jax
from etils import epath

from drl_jax.errors import UserError


@contextlib.contextmanager
def told(failure: str) -> Iterator[None]:
    """Has what goes wrong inside told in one line that opens with `failure`.

    Raises:
      UserError: for whatever the disk or the bucket raises.
    """
    try:
        yield
    except Exception as error:  # a disk's are OSErrors, a bucket's are TensorFlow's
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"{failure}: {reason}") from error


def make_writable(folder: epath.Path) -> None:
    """Makes a folder, if there is none, and sees that files can be written in it.

    Raises:
      UserError: if they cannot.
    """
    probe = folder / f".probe-{os.getpid()}"
    with told(f"cannot write to {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()


@contextlib.contextmanager
def whole(path: epath.Path) -> Iterator[BinaryIO]:
    """Opens a file to be written, which gets its name when all is written, in one step.

    An interrupted write leaves what was there before. What goes wrong in a write itself is for
    the caller to tell.

    Raises:
      UserError: if it cannot be opened or finished.
    """
    if jax.process_index():
        yield _Nowhere()
        return
    aside, failure = path.parent / f".{path.name}-{os.getpid()}", f"cannot write to {path}"
    try:
        with contextlib.ExitStack() as stack:
            with told(failure):
                file = stack.enter_context(aside.open("wb"))
            yield file
            with told(failure):
                stack.close()  # a bucket gets the content now
                aside.replace(path)
    except BaseException:
        with contextlib.suppress(Exception):
            aside.unlink(missing_ok=True)
        raise


def write_whole(path: epath.Path, content: bytes) -> None:
    """Writes a file of this content in one step, as `whole` does.

    Raises:
      UserError: if it cannot be written.
    """
    with whole(path) as file, told(f"cannot write to {path}"):
        file.write(content)


def remove(path: epath.Path) -> None:
    """Removes a file, if it is there."""
    if not jax.process_index():
        path.unlink(missing_ok=True)


class _Nowhere(io.BytesIO):
    """Where processes other than the first one write."""

    def write(self, content: Any) -> int:
        return len(memoryview(content))
