"""Folders of results, in which those of different settings never mix.

Each folder contains `settings.json`, which says how its results were computed. Results with
other settings go to another folder: NAME, then NAME_2, NAME_3, ...
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

from drl_jax.errors import UserError, as_user_error
from drl_jax.runtime import preemption, processes
from drl_jax.storage.atomic import make_writable, write_json

log = logging.getLogger(__name__)

SETTINGS = "settings.json"


@contextlib.contextmanager
def folder(path: epath.Path, settings: dict[str, Any]) -> Iterator[epath.Path]:
    """Creates the folder for the results with these settings, and writes `settings.json`.

    This is `path` if it does not exist, is empty, or contains results with the same settings,
    which are then replaced. Otherwise, a number is appended to its name. If the context ends
    with a `UserError`, a folder that it has created is removed.

    Args:
      path: the folder.
      settings: everything on which the results depend, as JSON values by name.

    Raises:
      UserError: if the folder cannot be created, read or written to.
      Interrupted: if a signal has stopped the body.
    """
    settings = json.loads(json.dumps(settings))  # tuples become lists, as in the file
    chosen, is_new = processes.broadcast_from_first(_choose(path, settings))
    chosen = epath.Path(chosen)
    make_writable(chosen)
    write_settings(chosen, settings)
    if chosen != path:
        log.info("%s contains results with other settings: using %s", path, chosen)
    incomplete = f"the results in {chosen} are incomplete: the same command starts again"
    try:
        with preemption.reporting(incomplete, has_others=jax.process_count() > 1):
            yield chosen
    except UserError:
        if is_new and not jax.process_index():
            chosen.rmtree(missing_ok=True)
        raise


def write_settings(path: epath.Path, settings: dict[str, Any]) -> None:
    """Writes `settings.json` to a folder.

    Raises:
      UserError: if it cannot be written.
    """
    write_json(path / SETTINGS, settings)


def digest(arrays: PyTree) -> str:
    """Returns a short hash of the values of a pytree's arrays, for use in settings."""
    total = hashlib.sha256()
    for leaf in jax.tree.leaves(arrays):
        total.update(np.asarray(leaf).tobytes())
    return total.hexdigest()[:16]


def _choose(path: epath.Path, settings: dict[str, Any]) -> tuple[str, bool]:
    """Returns the path of the folder to be used, and whether it has no results yet."""
    with as_user_error(f"cannot read {path}"):
        for number in itertools.count(1):
            candidate = path if number == 1 else path.parent / f"{path.name}_{number}"
            if not candidate.exists() or not any(candidate.iterdir()):
                return str(candidate), True
            if _read(candidate / SETTINGS) == settings:
                return str(candidate), False
    raise AssertionError("unreachable")


def _read(path: epath.Path) -> Any:
    """Returns the settings in a file, or None if there is no file or it is damaged."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
