"""Folders of results, in which those of different settings never mix.

Each folder contains `settings.json`, which says how its results were computed. Results with
other settings go to another folder: NAME, then NAME_2, NAME_3, ... A folder with one of these
names is complete: results are written to NAME.unfinished_HASH, which is renamed at the end.
"""

import contextlib
import hashlib
import itertools
import json
import logging
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import PyTree

from drl_jax.errors import Interrupted, as_user_error
from drl_jax.runtime import preemption
from drl_jax.storage import lock
from drl_jax.storage.atomic import make_writable, remove, write_json

log = logging.getLogger(__name__)

SETTINGS = "settings.json"


@contextlib.contextmanager
def folder(path: epath.Path, settings: dict[str, Any]) -> Iterator[epath.Path]:
    """Yields a new folder for results, which becomes `path` when the context ends.

    If `path` contains results with the same settings, all of them are replaced. If it contains
    other files, a number is appended to its name. The final name is logged.

    After an exception, all results are as before. The new folder is removed, unless the
    exception is `Interrupted`.

    Args:
      path: the final folder.
      settings: everything on which the results depend, as JSON values by name. They are written
        to `settings.json`. Different settings can be used at the same time.

    Raises:
      UserError: if a folder cannot be created, read, written to or renamed, or another process
        is computing the same results.
      Interrupted: if a signal has stopped the body.
    """
    encoded = json.dumps(settings, sort_keys=True)
    settings = json.loads(encoded)  # tuples become lists, as in the file
    name = f"{path.name}.unfinished_{hashlib.sha256(encoded.encode()).hexdigest()[:8]}"
    unfinished = path.parent / name
    make_writable(path.parent)
    report = f"{unfinished} has the results so far: the same command starts again"
    with as_user_error(f"cannot write to {unfinished}"):
        unfinished.mkdir(exist_ok=True)
    with lock.held(unfinished):
        try:
            if not jax.process_index():
                _empty(unfinished)  # of what a process that was killed has left
            write_json(unfinished / SETTINGS, settings)
            with preemption.reporting(report, has_others=jax.process_count() > 1):
                yield unfinished
        except Interrupted:
            raise
        except Exception:
            if not jax.process_index():
                unfinished.rmtree(missing_ok=True)
            raise
    if not jax.process_index():
        _publish(unfinished, path, settings)


def begin(path: epath.Path, settings: dict[str, Any], last: str) -> None:
    """Prepares a folder that also has other files, for the replacement of its results.

    Removes the result that is written last, and writes `settings.json`. So if the program is
    killed, results that do not belong together are never next to the last one.

    Args:
      path: the folder.
      settings: how the results were computed, as JSON values by name.
      last: name of the file that is written last.

    Raises:
      UserError: if a file cannot be removed or written.
    """
    remove(path / last)
    write_json(path / SETTINGS, settings)


def digest(arrays: PyTree) -> str:
    """Returns a short hash of the values of a pytree's arrays, for use in settings."""
    total = hashlib.sha256()
    for leaf in jax.tree.leaves(arrays):
        total.update(np.asarray(leaf).tobytes())
    return total.hexdigest()[:16]


def _empty(folder: epath.Path) -> None:
    """Removes everything in a folder, except the file of its lock.

    Raises:
      UserError: if this fails.
    """
    with as_user_error(f"cannot write to {folder}"):
        for path in folder.iterdir():
            if path.is_dir():
                path.rmtree()
            elif path.name != lock.FILE:
                path.unlink()


def _publish(unfinished: epath.Path, path: epath.Path, settings: dict[str, Any]) -> None:
    """Renames a finished folder, which replaces the one with the same settings.

    The replaced folder is renamed before it is removed, so that no part of it is ever left
    under its name.

    Raises:
      UserError: if this fails; the finished folder is then kept.
    """
    with as_user_error(f"cannot rename {unfinished} to its final name"):
        chosen = _choose(path, settings)
        replaced = path.parent / f"{unfinished.name}_replaced"
        replaced.rmtree(missing_ok=True)  # of a process that was killed
        if chosen.exists():
            chosen.rename(replaced)
        unfinished.rename(chosen)
        replaced.rmtree(missing_ok=True)
    if chosen != path:
        log.info("%s contains results with other settings", path)
    log.info("wrote all results to %s", chosen)


def _choose(path: epath.Path, settings: dict[str, Any]) -> epath.Path:
    """Returns the first of NAME, NAME_2, ... that is free or has these settings."""
    names = (f"{path.name}_{number}" for number in itertools.count(2))
    for candidate in itertools.chain([path], (path.parent / name for name in names)):
        if not candidate.exists() or not any(candidate.iterdir()):
            return candidate
        if _read(candidate / SETTINGS) == settings:
            return candidate
    raise AssertionError("unreachable")


def _read(path: epath.Path) -> Any:
    """Returns the settings in a file, or None if there is no file or it is damaged."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
