"""Writes files in both formats of torch.save, without PyTorch.

They were compared with files written by PyTorch 2.15: `torch_file` reads the same tensors.
"""

import collections
import io
import pickle
import sys
import types
import zipfile

import numpy as np
import pytest

from drl_jax.storage import torch_file

STORAGES = {
    "f2": "HalfStorage",
    "f4": "FloatStorage",
    "f8": "DoubleStorage",
    "i8": "LongStorage",
}


class Tensor:
    """A view of a storage, which `Pickler` pickles as PyTorch pickles its tensors."""

    def __init__(self, storage, offset, shape, strides):
        self.storage, self.view = storage, (offset, shape, strides)


def tensor(array):
    """Returns an array as a tensor with a storage of its own."""
    strides = tuple(step // array.itemsize for step in array.strides)
    return Tensor(array.ravel(), 0, array.shape, strides)


class Pickler(pickle.Pickler):
    """Pickles tensors as calls of `_rebuild_tensor_v2`, and collects their storages."""

    def __init__(self, file, torch):
        super().__init__(file, protocol=2)
        self.torch, self.storages = torch, {}

    def persistent_id(self, obj):
        if not isinstance(obj, np.ndarray):
            return None
        key = str(len(self.storages))
        self.storages[key] = obj
        storage_type = getattr(self.torch, STORAGES[obj.dtype.str[1:]])
        return ("storage", storage_type, key, "cpu", obj.size, *self.torch.more)

    def reducer_override(self, obj):
        if isinstance(obj, Tensor):
            rebuild = sys.modules["torch._utils"]._rebuild_tensor_v2
            return rebuild, (obj.storage, *obj.view, False, collections.OrderedDict())
        return NotImplemented


@pytest.fixture
def torch(monkeypatch):
    """Returns stand-ins for PyTorch's modules, of which pickles contain only the names."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in STORAGES.values():
        setattr(torch, name, type(name, (), {"__module__": "torch"}))

    def _rebuild_tensor_v2(): ...

    _rebuild_tensor_v2.__module__ = "torch._utils"
    _rebuild_tensor_v2.__qualname__ = "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2 = _rebuild_tensor_v2
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)
    return torch


def write_zip(obj, torch, byteorder=b"little"):
    """Returns a file in the format of PyTorch 1.6 and later."""
    torch.more = ()
    pickled, file = io.BytesIO(), io.BytesIO()
    pickler = Pickler(pickled, torch)
    pickler.dump(obj)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("weights/data.pkl", pickled.getvalue())
        archive.writestr("weights/byteorder", byteorder)
        for key, storage in pickler.storages.items():
            archive.writestr(f"weights/data/{key}", storage.tobytes())
    return file.getvalue()


def write_legacy(obj, torch, byteorder=b"little"):
    """Returns a file in the format of PyTorch before 1.6."""
    torch.more = (None,)
    file = io.BytesIO()
    little = {"protocol_version": 1001, "little_endian": byteorder == b"little"}
    for header in (torch_file.MAGIC, 1001, little):
        pickle.dump(header, file, protocol=2)
    pickler = Pickler(file, torch)
    pickler.dump(obj)
    pickle.dump(list(pickler.storages), file, protocol=2)
    for storage in pickler.storages.values():
        file.write(np.int64(storage.size).tobytes() + storage.tobytes())
    return file.getvalue()


def save(path, arrays, torch, write=write_legacy):
    """Writes named arrays to a file as a state dict."""
    path.write_bytes(write({name: tensor(array) for name, array in arrays.items()}, torch))
