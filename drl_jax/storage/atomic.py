"""Writing files in one step, so that no reader ever sees half a file.

All processes of a job share the folder; only the first process writes.
"""

import contextlib
import io
import json
import os
from collections.abc import Iterator
from typing import Any, BinaryIO

import jax
from etils import epath

from drl_jax.errors import as_user_error


def make_writable(folder: epath.Path) -> None:
    """Creates a folder if necessary, and checks that files can be written in it.

    Raises:
      UserError: if the folder cannot be created or written to.
    """
    probe = folder / f".probe-{os.getpid()}"
    with as_user_error(f"cannot write to {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()


@contextlib.contextmanager
def replacing(path: epath.Path) -> Iterator[BinaryIO]:
    """Opens a file for writing that replaces `path` in one step when it is complete.

    An interrupted write leaves the previous content in place. Exceptions raised by the
    caller's own writes are passed on as they are.

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
    except BaseException:
        with contextlib.suppress(Exception):
            temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: epath.Path, content: bytes) -> None:
    """Writes a file in one step, as `replacing` does.

    Raises:
      UserError: if the file cannot be written.
    """
    with replacing(path) as file, as_user_error(f"cannot write to {path}"):
        file.write(content)


def write_json(path: epath.Path, values: Any) -> None:
    """Writes values as indented JSON in one step.

    Raises:
      UserError: if the file cannot be written.
    """
    write_atomically(path, (json.dumps(values, indent=2) + "\n").encode())


def remove(path: epath.Path) -> None:
    """Removes a file if it exists."""
    if not jax.process_index():
        path.unlink(missing_ok=True)


class _Discard(io.BytesIO):
    """A file that discards what is written to it, for all processes but the first."""

    def write(self, content: Any) -> int:
        return len(memoryview(content))
