"""The record of the data that a run was trained on: a file in its work directory.

A run that resumes, and a task that measures a model on data, compare their data with it. They
may have moved; whether they are the same is decided by `Source.fingerprint`.
"""

import json
import logging
from typing import Any

import jax
from etils import epath

from drl_jax import config as config_lib
from drl_jax.data.sources import Source
from drl_jax.errors import UserError, as_user_error
from drl_jax.runtime import processes
from drl_jax.storage.atomic import write_json

log = logging.getLogger(__name__)

FILE = "data.json"  # name of the file
PLACE = "folder"  # the field of the record that says where the data were


def update(
    workdir: epath.Path, source: Source, resumed: bool, may_differ: bool = False
) -> None:
    """Compares the data of a run that resumes with its record, and writes the new record.

    Changed data are reported, and training goes on with them, because images may have been
    added or removed on purpose. All processes of a job call this.

    Args:
      workdir: work directory of the run.
      source: the training data.
      resumed: whether the run was trained before.
      may_differ: whether other data in another place are permitted, too.

    Raises:
      UserError: if the processes of the job see different data, the data are in another place
        and must not but do differ, or the record cannot be read or written.
    """
    if jax.process_count() > 1:
        processes.require_same({"the data set": source.fingerprint})
    is_first = jax.process_index() == 0
    old = processes.broadcast_from_first(read(workdir) if is_first else None)
    new = {PLACE: str(source.folder or ""), **source.fingerprint}
    changes = differences(old, source) if old and resumed else []
    if old and changes:
        if old[PLACE] != new[PLACE] and not may_differ:
            raise UserError(
                f"the data in {new[PLACE]} are not those in {old[PLACE]} that this run was "
                f"trained on ({'; '.join(changes)}): give the path of the old data, give "
                "another --workdir, or add --resume_with_changes to continue with the new ones"
            )
        log.warning(
            "the data have changed since this run was trained (%s): from here on, the images "
            "come in another order, and some test images may have been trained on",
            "; ".join(changes),
        )
    if old != new:
        write_json(workdir / FILE, new)


def warn_if_changed(workdir: epath.PathLike, source: Source) -> None:
    """Logs a warning if data are not those on which the model in a work directory was trained.

    Does nothing if there is no record, as for a model that is not in a work directory.

    Raises:
      UserError: if the record cannot be read.
    """
    old = read(epath.Path(workdir).expanduser())
    if old and (changes := differences(old, source)):
        log.warning(
            "these are not the data that the model was trained on (%s)", "; ".join(changes)
        )


def read(workdir: epath.Path) -> dict[str, Any] | None:
    """Returns the record in a work directory, or None if there is none.

    Raises:
      UserError: if it cannot be read.
    """
    with as_user_error(f"cannot read {workdir / FILE}"):
        try:
            return json.loads((workdir / FILE).read_text())
        except (FileNotFoundError, NotADirectoryError):
            return None


def differences(old: dict[str, Any], source: Source) -> list[str]:
    """Returns one line per value in which data differ from a record; empty if they are equal.

    What only one of the two states, such as the size of files in a bucket, is not compared.
    """
    new = source.fingerprint
    common = (old.keys() & new.keys()) - {PLACE}
    return config_lib.differences(
        {name: old[name] for name in common}, {name: new[name] for name in common}
    )
