"""Arrays that are computed from the data once and cached in a file."""

import hashlib
import json
import logging
from collections.abc import Callable

import numpy as np
from etils import epath

from drl_jax.data.sources import Source
from drl_jax.errors import UserError
from drl_jax.storage import npz
from drl_jax.storage.atomic import write_atomically

log = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]


def of_data(
    kind: str,
    description: str,
    key: list[object],
    source: Source,
    n: int,
    workdir: epath.Path,
    compute: Callable[[], Arrays],
) -> Arrays:
    """Returns arrays from a cache file if there is one; otherwise computes and writes them.

    The file is next to the folder that contains the data, or in the work directory if that
    place does not exist or cannot be written to. Its name contains `kind` and a hash of the
    source's identity, n, the sizes and times of the files (`Source.version`) and `key`.

    Args:
      kind: first part of the file's name.
      description: what the arrays are, for log lines.
      key: JSON values on which the arrays depend, besides the source and n.
      source: the data.
      n: number of examples, the first of the source, on which the arrays depend.
      workdir: work directory of the run.
      compute: computes the arrays.

    Raises:
      UserError: if the files of the data cannot be accessed, and what `compute` raises.
    """
    content = json.dumps([source.identity, source.version(n), n, *key])
    name = f"{kind}-{hashlib.sha256(content.encode()).hexdigest()[:16]}.npz"
    files = [workdir / name]
    if source.folder is not None:
        files.insert(0, source.folder.parent / f"{source.folder.name}.{name}")
    for file in files:
        arrays = read(file)
        if arrays is not None:
            log.info("using %s cached in %s", description, file)
            return arrays
    arrays = compute()
    for file in files:
        try:
            write(file, arrays)
        except UserError as error:
            log.info("cannot cache %s: %s", description, error)
        else:
            log.info("cached %s in %s", description, file)
            break
    return arrays


def write(file: epath.Path, arrays: Arrays) -> None:
    """Writes arrays in one step, so that no reader sees an incomplete file.

    Raises:
      UserError: if the file cannot be written.
    """
    write_atomically(file, npz.encode(arrays))


def read(file: epath.Path) -> Arrays | None:
    """Returns the arrays in a file, or None if the file is missing or damaged."""
    try:
        return npz.decode(file.read_bytes())
    except FileNotFoundError:
        return None
    except Exception as error:  # local disks, buckets and damaged files raise many classes
        log.warning("cannot read %s (%s); its content will be computed again", file, error)
        return None
