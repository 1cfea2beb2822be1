"""NumPy's .npz format, with every checksum verified on reading.

An .npz file is a zip archive with one member per array and the CRC-32 of each. `np.load` does
not always read a member to its end, where its checksum is compared, and does not notice when
damage to the archive's directory hides a member.
"""

import io
import zipfile
from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

# Position of the number of members in a zip archive without a comment: in its last record.
COUNT = slice(-12, -10)


class DamagedError(ValueError):
    """The bytes are not an undamaged .npz file."""


def encode(arrays: Mapping[str, ArrayLike], compress: bool = False) -> bytes:
    """Returns the content of an .npz file with these arrays."""
    content = io.BytesIO()
    save = np.savez_compressed if compress else np.savez
    save(content, allow_pickle=False, **{name: np.asarray(a) for name, a in arrays.items()})
    return content.getvalue()


def decode(content: bytes) -> dict[str, np.ndarray]:
    """Returns the arrays of an .npz file by name: the inverse of `encode`.

    Raises:
      DamagedError: if this is not an .npz file, a checksum does not match, or a member is
        missing.
    """
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            if member := archive.zip.testzip():
                raise zipfile.BadZipFile(f"wrong checksum of {member}")
            if len(archive.files) != int.from_bytes(content[COUNT], "little"):
                raise zipfile.BadZipFile("missing members")
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # damage to a zip's headers can raise almost anything
        raise DamagedError(str(error)) from error
