"""Writing to folders that others may look at, or that may not be writable.

Of several processes only the first one writes: the folder is the same for all.
"""

import contextlib
import os
from collections.abc import Iterator

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


def write_whole(path: epath.Path, content: bytes) -> None:
    """Writes a file under another name and then gives it its own, in one step.

    An interrupted write leaves what was there before.

    Raises:
      UserError: if it cannot be written.
    """
    if jax.process_index():
        return
    aside = path.parent / f".{path.name}-{os.getpid()}"
    with told(f"cannot write to {path}"):
        aside.write_bytes(content)
        aside.replace(path)


def remove(path: epath.Path) -> None:
    """Removes a file, if it is there."""
    if not jax.process_index():
        path.unlink(missing_ok=True)
