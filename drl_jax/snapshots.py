"""Unfinished work of a mode other than training, in one file.

It is replaced in one step, so that an interrupted write leaves the one before, and sealed with
its checksum: a flipped bit would else be read in silence.
"""

import io
import json
import zlib
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from drl_jax import config as config_lib
from drl_jax.errors import UserError
from drl_jax.files import told, write_whole

NUMBERS = "numbers"  # the array that holds them, and the settings
SEAL = 4  # bytes of the checksum, before those of an .npz


class Snapshot(NamedTuple):
    """What is kept.

    Attributes:
      numbers: what JSON can say.
      arrays: by name.
    """

    numbers: dict[str, Any]
    arrays: dict[str, np.ndarray]


def write(path: epath.Path, snapshot: Snapshot, settings: dict[str, Any]) -> None:
    """Replaces the file, in one step.

    Args:
      path: of the file.
      snapshot: the work so far.
      settings: by name, what must be the same when a later start goes on from here.

    Raises:
      UserError: if it cannot be written.
    """
    encoded = io.BytesIO()
    members: dict[str, Any] = dict(snapshot.arrays)
    members[NUMBERS] = np.frombuffer(
        json.dumps([snapshot.numbers, settings]).encode(), np.uint8
    )
    np.savez(encoded, **members)
    content = encoded.getvalue()
    write_whole(path, _seal(content) + content)


def read(path: epath.Path, settings: dict[str, Any]) -> Snapshot | None:
    """Returns what was written last, or None if nothing was.

    Raises:
      UserError: if the file cannot be read, is not what was written, or was written with
        other settings: then, naming every difference.
    """
    with told(f"cannot read {path}"):
        if not path.exists():
            return None
        sealed = path.read_bytes()
    seal, content = sealed[:SEAL], sealed[SEAL:]
    if seal != _seal(content):
        raise UserError(f"{path} is damaged: put back a copy, or remove it to begin anew")
    with np.load(io.BytesIO(content)) as members:
        arrays = {name: members[name] for name in members.files}
    numbers, old = json.loads(arrays.pop(NUMBERS).tobytes())
    new = json.loads(json.dumps(settings))
    if different := config_lib.differences(old, new):
        raise UserError(
            f"the chains in {path.parent} were begun with other settings "
            f"({'; '.join(different)}): give another --seed or the old values"
        )
    return Snapshot(numbers, arrays)


def _seal(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(SEAL, "big")
