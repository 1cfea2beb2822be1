"""Reads the tensors of a file written by `torch.save`, without PyTorch.

There are two formats. Since PyTorch 1.6 a file is a zip archive with a pickle, 'data.pkl', and
one entry with the raw elements of each storage. Older files are a sequence of pickles (magic
number, format version, machine description, object, storage keys) followed by each storage as
its number of elements and its raw elements. In both, a tensor is pickled as a call of a
function that builds it from a storage. A pickle can make its reader call any function, so this
module allows only the calls that build tensors and rejects all others.
"""

import collections
import io
import pickle
import zipfile
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Num

MAGIC = 0x1950A86A20F9469CFC6C  # first object of a file in the older format

STORAGES = {
    "HalfStorage": np.dtype("<f2"),
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "LongStorage": np.dtype("<i8"),  # batch normalisation's counter of batches
}


class Storage(NamedTuple):
    """Reference to a block of elements in the file.

    Attributes:
      dtype: type of the elements.
      key: identifies the block in the file.
      size: number of elements.
    """

    dtype: np.dtype
    key: str
    size: int


class View(NamedTuple):
    """A tensor whose storage has not been read yet.

    Attributes:
      storage: the block with its elements.
      offset: position of its first element in the storage [elements].
      shape: its shape.
      strides: distance between neighbours along each axis [elements].
    """

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read(data: bytes) -> dict[str, Num[np.ndarray, "..."]]:
    """Returns the tensors of a saved state dict, by name.

    Args:
      data: content of the file.

    Raises:
      ValueError, pickle.UnpicklingError: if the file has another format or contains anything
        but tensors. For damaged files, pickle and zipfile also raise other exceptions.
    """
    views, read_storage = _read(data)
    return {name: _to_array(repr(name), view, read_storage) for name, view in views.items()}


def read_nested(data: bytes, names: Collection[str]) -> dict[str, Any]:
    """Returns some entries of a saved dictionary, with arrays in place of tensors.

    Args:
      data: content of the file.
      names: entries to return, if they exist. They may hold tensors and plain values in nested
        dictionaries, lists and tuples. The tensors of other entries are not read.

    Raises:
      ValueError, pickle.UnpicklingError: as `read`, but plain values are allowed.
    """
    entries, read_storage = _read(data)

    def convert(name, value):
        if isinstance(value, View):
            return _to_array(name, value, read_storage)
        if isinstance(value, dict):
            return {key: convert(f"{name}[{key!r}]", inner) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [convert(f"{name}[{i}]", inner) for i, inner in enumerate(value)]
        return value

    return {name: convert(repr(name), entries[name]) for name in names if name in entries}


def _read(data: bytes) -> tuple[dict[str, Any], Callable[[Storage], bytes]]:
    """Returns the pickled dictionary and the function that reads a storage.

    Raises:
      ValueError: if the file contains another object.
    """
    read_format = _read_zip if zipfile.is_zipfile(io.BytesIO(data)) else _read_legacy
    views, read_storage = read_format(io.BytesIO(data))
    if not isinstance(views, dict):
        raise ValueError(f"it contains a {type(views).__name__}, not a state dict")
    return views, read_storage


def _read_zip(file: io.BytesIO) -> tuple[Any, Callable[[Storage], bytes]]:
    """Returns the pickled object of a zip archive, and the function that reads a storage."""
    archive = zipfile.ZipFile(file)
    pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError("it is a zip archive that torch.save did not write")
    root = pickles[0].removesuffix("data.pkl")
    if root + "byteorder" in archive.namelist():
        _require_little_endian(archive.read(root + "byteorder") == b"little")
    views = _Unpickler(archive.open(pickles[0])).load()
    return views, lambda storage: archive.read(f"{root}data/{storage.key}")


def _read_legacy(file: io.BytesIO) -> tuple[Any, Callable[[Storage], bytes]]:
    """Returns the same for a file in the older format."""
    if _Unpickler(file).load() != MAGIC:
        raise ValueError("torch.save did not write it")
    _Unpickler(file).load()  # version of the format; there was only one
    _require_little_endian(_Unpickler(file).load()["little_endian"])
    unpickler = _Unpickler(file)
    views = unpickler.load()
    blocks = {}
    for key in _Unpickler(file).load():
        size = int.from_bytes(file.read(8), "little")
        blocks[key] = file.read(size * unpickler.storages[key].dtype.itemsize)
    return views, lambda storage: blocks[storage.key]


def _require_little_endian(is_little_endian: bool) -> None:
    if not is_little_endian:
        raise ValueError("its numbers are big-endian")


class _Unpickler(pickle.Unpickler):
    """Unpickles plain values, and tensors as `View`s; rejects everything else."""

    def __init__(self, file: Any):
        super().__init__(file)
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        allowed: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _view,
            ("torch._utils", "_rebuild_parameter"): lambda view, *_: view,
        }
        if (module, name) in allowed:
            return allowed[module, name]
        raise pickle.UnpicklingError(f"it contains {module}.{name}; only tensors are allowed")

    def persistent_load(self, pid: Any) -> Storage:
        _, dtype, key, _, size = pid[:5]  # a sixth field, if present, is None
        self.storages[key] = Storage(dtype, key, size)
        return self.storages[key]


def _view(storage: Storage, offset: int, shape: tuple, strides: tuple, *_: object) -> View:
    return View(storage, offset, shape, strides)


def _to_array(
    name: str, view: Any, read_storage: Callable[[Storage], bytes]
) -> Num[np.ndarray, "..."]:
    """Returns a tensor as an array.

    Args:
      name: name of the tensor, for error messages.
      view: the tensor.
      read_storage: returns the content of a storage.

    Raises:
      ValueError: if it is not a tensor, or has elements outside its storage.
    """
    if not isinstance(view, View):
        raise ValueError(f"{name} is a {type(view).__name__}, not a tensor")
    elements = np.frombuffer(read_storage(view.storage), view.storage.dtype)
    last = [(n - 1) * s for n, s in zip(view.shape, view.strides, strict=True)]
    if min(view.offset, *view.shape, *view.strides, 0) < 0 or (
        np.prod(view.shape) and view.offset + sum(last) >= len(elements)
    ):
        raise ValueError(f"{name} has elements outside its storage")
    return np.lib.stride_tricks.as_strided(
        elements[view.offset :],
        view.shape,
        [s * elements.itemsize for s in view.strides],
        writeable=False,
    )
