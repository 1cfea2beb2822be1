"""Snapshots of the unfinished work of tasks other than training.

A task has one file, which is replaced atomically at regular intervals: an interrupted write
leaves the previous snapshot in place.
"""

import contextlib
import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from drl_jax import config as config_lib
from drl_jax.errors import Interrupted, UserError, as_user_error, resumable
from drl_jax.runtime import preemption
from drl_jax.storage import npz
from drl_jax.storage.atomic import write_atomically

INTERVAL = 60.0  # shortest time between two saves [seconds]

NUMBERS = "numbers"  # name of the array that holds numbers and settings, as JSON

ZIP = b"PK\x03\x04"  # first bytes of an .npz file
OLD_HEADER = 4  # bytes of a checksum before the .npz content, in files of earlier versions


class Snapshot(NamedTuple):
    """State of a task between two calls of its compiled program.

    Attributes:
      numbers: JSON-serialisable values by name.
      arrays: arrays by name.
    """

    numbers: dict[str, Any]
    arrays: dict[str, np.ndarray]


class Autosave:
    """Saves unfinished work every `INTERVAL` seconds, and when a signal stops the program.

    A loop over calls of a compiled program uses it as a context manager:

        autosave = Autosave(path, settings)
        snapshot = autosave.restore()  # None if there is nothing to resume
        with autosave:
            for done in ...:
                ...  # one call of the compiled program
                autosave.step(done, lambda: Snapshot(numbers, arrays))

    Inside the context, SIGTERM and SIGINT do not end the program at once: the next call of
    `step` saves and raises `Interrupted`. The file stays when the work is finished; a task that
    no longer needs it calls `atomic.remove`.
    """

    def __init__(self, path: epath.Path, settings: dict[str, Any]):
        """Prepares saving; no file is created until the first save.

        Args:
          path: path of the file.
          settings: JSON-serialisable values by name. Work is only resumed with equal settings.
        """
        self.path, self.settings = path, settings
        self._context = contextlib.ExitStack()
        self._stop: Callable[[], int | None] = lambda: None
        self._saved = 0.0

    def __enter__(self) -> "Autosave":
        self._stop = self._context.enter_context(preemption.stop_on_signal())
        self._saved = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self._context.close()

    def restore(self) -> Snapshot | None:
        """Returns the newest snapshot, or None if there is none.

        Raises:
          UserError: as `read` does.
        """
        return read(self.path, self.settings)

    def step(self, done: int, snapshot: Callable[[], Snapshot]) -> None:
        """Saves if the last save is `INTERVAL` seconds old or a signal has arrived.

        All processes of a job must call this equally often.

        Args:
          done: number of steps made so far, for the message of `Interrupted`.
          snapshot: returns the state to save; called only if it is saved.

        Raises:
          Interrupted: if SIGTERM or SIGINT has arrived; the snapshot is saved.
          UserError: if the file cannot be written.
        """
        signum = self._stop()
        if signum or time.monotonic() - self._saved > INTERVAL:
            self.save(snapshot())
        if signum:
            raise Interrupted(signum, resumable(done))

    def save(self, snapshot: Snapshot) -> None:
        """Saves now.

        Raises:
          UserError: if the file cannot be written.
        """
        write(self.path, snapshot, self.settings)
        self._saved = time.monotonic()


def write(path: epath.Path, snapshot: Snapshot, settings: dict[str, Any]) -> None:
    """Replaces the file atomically.

    Args:
      path: path of the file.
      snapshot: state to save.
      settings: settings by name, which `read` compares.

    Raises:
      UserError: if the file cannot be written.
    """
    encoded = json.dumps([snapshot.numbers, settings]).encode()
    arrays = snapshot.arrays | {NUMBERS: np.frombuffer(encoded, np.uint8)}
    write_atomically(path, npz.encode(arrays))


def read(path: epath.Path, settings: dict[str, Any]) -> Snapshot | None:
    """Returns the snapshot in the file, or None if there is no file.

    Args:
      path: path of the file.
      settings: settings by name, which must be those that were passed to `write`.

    Raises:
      UserError: if the file cannot be read, is damaged, was written by an earlier version, or
        was saved with other settings; the message then names every difference.
    """
    with as_user_error(f"cannot read {path}"):
        if not path.exists():
            return None
        content = path.read_bytes()
    earlier = UserError(
        f"{path} was written by an earlier version of this program: remove it to start again"
    )
    if content[OLD_HEADER : OLD_HEADER + len(ZIP)] == ZIP:
        raise earlier
    try:
        arrays = npz.decode(content)
        numbers, old = json.loads(arrays.pop(NUMBERS).tobytes())
    except (npz.DamagedError, KeyError) as error:
        raise UserError(
            f"{path} is damaged: replace it with a copy, or remove it to start again"
        ) from error
    new = json.loads(json.dumps(settings))
    if old.keys() != new.keys():  # each version of a task saves the same names
        raise earlier
    if different := config_lib.differences(old, new):
        raise UserError(
            f"the work saved in {path.parent} was started with other settings "
            f"({'; '.join(different)}): use the old values, or another --seed"
        )
    return Snapshot(numbers, arrays)
