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

from drl_jax.errors import UserError
from drl_jax.files import write_whole

NUMBERS = "numbers"  # the array that holds them
SEAL = 4  # bytes of the checksum, before those of an .npz


class Snapshot(NamedTuple):
    """What is kept.

    Attributes:
      numbers: what JSON can say.
      arrays: by name.
    """

    numbers: dict[str, Any]
    arrays: dict[str, np.ndarray]


def write(path: epath.Path, snapshot: Snapshot) -> None:
    """Replaces the file, in one step.

    Raises:
      UserError: if it cannot be written.
    """
    encoded = io.BytesIO()
    members: dict[str, Any] = dict(snapshot.arrays)
    members[NUMBERS] = np.frombuffer(json.dumps(snapshot.numbers).encode(), np.uint8)
    np.savez(encoded, **members)
    content = encoded.getvalue()
    write_whole(path, _seal(content) + content)


def read(path: epath.Path) -> Snapshot | None:
    """Returns what was written last, or None if nothing was.

    Raises:
      UserError: if the file cannot be read, or is not what was written.
    """
    if not path.exists():
        return None
    try:
        sealed = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    seal, content = sealed[:SEAL], sealed[SEAL:]
    if seal != _seal(content):
        raise UserError(f"{path} is damaged: put back a copy, or remove it to begin anew")
    with np.load(io.BytesIO(content)) as members:
        arrays = {name: members[name] for name in members.files}
    return Snapshot(json.loads(arrays.pop(NUMBERS).tobytes()), arrays)


def _seal(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(SEAL, "big")
