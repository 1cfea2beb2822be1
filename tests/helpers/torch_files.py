"""Writes files as torch.save does, without PyTorch.

Both writers were compared with PyTorch 2.15: the reader sees the same.
"""

import collections
import io
import pickle
import sys
import types
import zipfile

import numpy as np
import pytest

from drl_jax.metrics import torch_file

STORAGES = {
    "f2": "HalfStorage",
    "f4": "FloatStorage",
    "f8": "DoubleStorage",
    "i8": "LongStorage",
}


class Tensor:
    """To be pickled as PyTorch's are: a call that lays it over numbers of the file."""

    def __init__(self, numbers, offset, shape, strides):
        self.numbers, self.view = numbers, (offset, shape, strides)


def tensor(array):
    """A tensor whose elements lie in order."""
    strides = tuple(step // array.itemsize for step in array.strides)
    return Tensor(array.ravel(), 0, array.shape, strides)


class Pickler(pickle.Pickler):
    def __init__(self, file, torch):
        super().__init__(file, protocol=2)
        self.torch, self.storages = torch, {}

    def persistent_id(self, obj):
        if not isinstance(obj, np.ndarray):
            return None
        key = str(len(self.storages))
        self.storages[key] = obj
        kind = getattr(self.torch, STORAGES[obj.dtype.str[1:]])
        return ("storage", kind, key, "cpu", obj.size, *self.torch.more)

    def reducer_override(self, obj):
        if isinstance(obj, Tensor):
            rebuild = sys.modules["torch._utils"]._rebuild_tensor_v2
            return rebuild, (obj.numbers, *obj.view, False, collections.OrderedDict())
        return NotImplemented


@pytest.fixture
def torch(monkeypatch):
    """Modules whose names, and no more, the pickles hold."""
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
    torch.more = ()
    pickled, file = io.BytesIO(), io.BytesIO()
    pickler = Pickler(pickled, torch)
    pickler.dump(obj)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("weights/data.pkl", pickled.getvalue())
        archive.writestr("weights/byteorder", byteorder)
        for key, numbers in pickler.storages.items():
            archive.writestr(f"weights/data/{key}", numbers.tobytes())
    return file.getvalue()


def write_legacy(obj, torch, byteorder=b"little"):
    torch.more = (None,)
    file = io.BytesIO()
    little = {"protocol_version": 1001, "little_endian": byteorder == b"little"}
    for header in (torch_file.MAGIC, 1001, little):
        pickle.dump(header, file, protocol=2)
    pickler = Pickler(file, torch)
    pickler.dump(obj)
    pickle.dump(list(pickler.storages), file, protocol=2)
    for numbers in pickler.storages.values():
        file.write(np.int64(numbers.size).tobytes() + numbers.tobytes())
    return file.getvalue()
