"""The tensors of a file that PyTorch wrote, without PyTorch.

`torch.save` has written two formats. Since 1.6 a file is a zip archive: a pickle,
'data.pkl', beside one entry of raw numbers a storage. Before, it was pickles one after the
other (a magic number, a version, the machine, the object, the storages' keys) and then each
storage as its number of elements and its raw numbers. In both, a tensor is pickled as a call
that makes it from a storage. A pickle can call anything, so all but these calls is refused.
"""

import collections
import io
import pickle
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Num

MAGIC = 0x1950A86A20F9469CFC6C

STORAGES = {
    "HalfStorage": np.dtype("<f2"),
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "LongStorage": np.dtype("<i8"),  # a batch normalisation's count of batches
}


class Storage(NamedTuple):
    """Numbers that lie in the file under a key."""

    dtype: np.dtype
    key: str
    size: int


class View(NamedTuple):
    """A tensor before its storage is read; offset and strides count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read(data: bytes) -> dict[str, Num[np.ndarray, "..."]]:
    """Returns the tensors of a saved state dict by name.

    Raises:
      ValueError, pickle.UnpicklingError: if the file is of another kind or holds anything
        but tensors; damaged files also raise what pickle and zipfile do.
    """
    read_format = _read_zip if zipfile.is_zipfile(io.BytesIO(data)) else _read_legacy
    views, storages = read_format(io.BytesIO(data))
    if not isinstance(views, dict):
        raise ValueError(f"it holds a value of type {type(views).__name__}, not a state dict")
    return {name: _tensor(name, view, storages) for name, view in views.items()}


def _read_zip(file: io.BytesIO) -> tuple[Any, Callable[[Storage], bytes]]:
    archive = zipfile.ZipFile(file)
    pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError("it is a zip archive, but none of torch.save")
    root = pickles[0].removesuffix("data.pkl")
    if root + "byteorder" in archive.namelist():
        _require_little(archive.read(root + "byteorder") == b"little")
    views = _Unpickler(archive.open(pickles[0])).load()
    return views, lambda storage: archive.read(f"{root}data/{storage.key}")


def _read_legacy(file: io.BytesIO) -> tuple[Any, Callable[[Storage], bytes]]:
    if _Unpickler(file).load() != MAGIC:
        raise ValueError("it is no file of torch.save")
    _Unpickler(file).load()  # the version of the format, of which there was one
    _require_little(_Unpickler(file).load()["little_endian"])
    unpickler = _Unpickler(file)
    views = unpickler.load()
    blocks = {}
    for key in _Unpickler(file).load():
        size = int.from_bytes(file.read(8), "little")
        blocks[key] = file.read(size * unpickler.storages[key].dtype.itemsize)
    return views, lambda storage: blocks[storage.key]


def _require_little(little: bool) -> None:
    if not little:
        raise ValueError("its numbers are big-endian")


class _Unpickler(pickle.Unpickler):
    """Makes plain values and `View`s, and refuses to make anything else."""

    def __init__(self, file: Any):
        super().__init__(file)
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _view,
            ("torch._utils", "_rebuild_parameter"): lambda view, *_: view,
        }
        if (module, name) in known:
            return known[module, name]
        raise pickle.UnpicklingError(f"it holds {module}.{name}, and only tensors are read")

    def persistent_load(self, pid: Any) -> Storage:
        _, dtype, key, _, size = pid[:5]  # what follows was None since before 0.4
        self.storages[key] = Storage(dtype, key, size)
        return self.storages[key]


def _view(storage: Storage, offset: int, shape: tuple, strides: tuple, *_: object) -> View:
    return View(storage, offset, shape, strides)


def _tensor(
    name: str, view: Any, storages: Callable[[Storage], bytes]
) -> Num[np.ndarray, "..."]:
    """Lays a tensor over its storage, inside of which all its elements must be."""
    if not isinstance(view, View):
        raise ValueError(f"its {name!r} is a value of type {type(view).__name__}, not a tensor")
    numbers = np.frombuffer(storages(view.storage), view.storage.dtype)
    steps = [(n - 1) * s for n, s in zip(view.shape, view.strides, strict=True)]
    if min(view.offset, *view.shape, *view.strides, 0) < 0 or (
        np.prod(view.shape) and view.offset + sum(steps) >= len(numbers)
    ):
        raise ValueError(f"its {name!r} reaches beyond its numbers")
    return np.lib.stride_tricks.as_strided(
        numbers[view.offset :],
        view.shape,
        [s * numbers.itemsize for s in view.strides],
        writeable=False,
    )
