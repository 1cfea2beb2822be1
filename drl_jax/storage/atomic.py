"""Writes files atomically: a reader sees the complete old content or the complete new one.

All processes of a job call these functions, but only process 0 writes the content.
"""

import contextlib
import io
import json
import math
import os
from collections.abc import Iterator
from typing import Any, BinaryIO

import jax
from etils import epath

from drl_jax.errors import as_user_error


def make_writable(folder: epath.Path) -> None:
    """Creates a folder if necessary, and checks that files can be written in it.

    Every process does so, to find out whether it can access the folder.

    Raises:
      UserError: if the folder cannot be created or written to.
    """
    probe = folder / f".probe-{os.getpid()}"
    with as_user_error(f"cannot write to {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink(missing_ok=True)  # processes on other hosts can have the same number


@contextlib.contextmanager
def replacing(path: epath.Path) -> Iterator[BinaryIO]:
    """Opens a temporary file for writing, which replaces `path` when the context ends.

    If the context ends with an exception, the previous content of `path` stays in place and the
    exception is passed on.

    Raises:
      UserError: if the file cannot be opened or completed.
    """
    if jax.process_index():
        yield _Discard()
        return
    temporary = path.parent / f".{path.name}-{os.getpid()}"
    failure = f"cannot write to {path}"
    try:
        with contextlib.ExitStack() as stack:
            with as_user_error(failure):
                file = stack.enter_context(temporary.open("wb"))
            yield file
            with as_user_error(failure):
                stack.close()  # object stores upload the content here
                temporary.replace(path)
    except BaseException:  # also Ctrl-C: no incomplete file is left behind
        # The first exception is the one to report; buckets can raise almost any other here.
        with contextlib.suppress(Exception):
            temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: epath.Path, content: bytes) -> None:
    """Writes a file atomically.

    Raises:
      UserError: if the file cannot be written.
    """
    with replacing(path) as file, as_user_error(f"cannot write to {path}"):
        file.write(content)


def write_json(path: epath.Path, values: Any) -> None:
    """Writes values as indented JSON, atomically.

    Raises:
      UserError: if the file cannot be written.
    """
    write_atomically(path, (json.dumps(values, indent=2) + "\n").encode())


def finite_or_none(value: Any) -> Any:
    """Replaces NaN and infinities, which JSON cannot represent, by None in JSON values."""
    if isinstance(value, dict):
        return {name: finite_or_none(v) for name, v in value.items()}
    if isinstance(value, list):
        return [finite_or_none(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def remove(path: epath.Path) -> None:
    """Removes a file if it exists; only process 0 does.

    Raises:
      UserError: if it cannot be removed.
    """
    if not jax.process_index():
        with as_user_error(f"cannot remove {path}"):
            path.unlink(missing_ok=True)


class _Discard(io.BytesIO):
    """A file that discards what is written to it, for all processes except process 0."""

    def write(self, content: Any) -> int:
        return len(memoryview(content))
