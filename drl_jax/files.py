"""Writing to folders that others may look at, or that may not be writable.

Of several processes only the first one writes: the folder is the same for all.
"""

import os

import jax
from etils import epath

from drl_jax.errors import UserError


def make_writable(folder: epath.Path) -> None:
    """Makes a folder, if there is none, and sees that files can be written in it.

    Raises:
      UserError: if they cannot.
    """
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error


def write_whole(path: epath.Path, content: bytes) -> None:
    """Writes a file under another name and then gives it its own, in one step.

    An interrupted write leaves what was there before.

    Raises:
      UserError: if it cannot be written.
    """
    if jax.process_index():
        return
    aside = path.parent / f".{path.name}-{os.getpid()}"
    try:
        aside.write_bytes(content)
        aside.replace(path)
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}") from error


def remove(path: epath.Path) -> None:
    """Removes a file, if it is there."""
    if not jax.process_index():
        path.unlink(missing_ok=True)
