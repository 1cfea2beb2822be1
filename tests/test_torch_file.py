"""Files as torch.save writes them, made here without PyTorch.

The two writers below were seen to agree with PyTorch 2.15 in what the reader sees.
"""

import collections
import io
import pickle
import sys
import types
import zipfile

import numpy as np
import pytest

from drl_jax.evaluation import torch_file

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


FORMATS = pytest.mark.parametrize("write", [write_zip, write_legacy])


@FORMATS
@pytest.mark.parametrize("kind", STORAGES)
def test_tensors_of_every_kind_and_shape_come_back(torch, write, kind):
    saved = {
        "matrix": np.arange(6, dtype=kind).reshape(2, 3),
        "kernel": np.arange(24, dtype=kind).reshape(1, 2, 3, 4),
        "number": np.array(7, kind),
        "empty": np.zeros((0, 3), kind),
    }
    data = write({name: tensor(array) for name, array in saved.items()}, torch)
    found = torch_file.read(data)
    assert found.keys() == saved.keys()
    for name, array in saved.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


@FORMATS
def test_tensors_may_share_numbers_and_lie_across_them(torch, write):
    numbers = np.arange(10, dtype=np.float32)
    saved = {
        "transposed": Tensor(numbers, 0, (2, 3), (1, 2)),
        "tail": Tensor(numbers, 7, (3,), (1,)),
    }
    found = torch_file.read(write(saved, torch))
    np.testing.assert_array_equal(found["transposed"], [[0, 2, 4], [1, 3, 5]])
    np.testing.assert_array_equal(found["tail"], [7, 8, 9])


@FORMATS
def test_a_state_dict_is_an_ordered_dict_with_an_attribute(torch, write):
    saved = collections.OrderedDict(x=tensor(np.ones(2, np.float32)))
    saved._metadata = {"": {"version": 1}}
    np.testing.assert_array_equal(torch_file.read(write(saved, torch))["x"], [1, 1])


class Unwanted:
    def __reduce__(self):
        return print, ("this must never be printed",)


@FORMATS
def test_a_pickle_that_calls_anything_else_is_refused_before_it_does(torch, write, capsys):
    with pytest.raises(
        pickle.UnpicklingError, match=r"holds __builtin__\.print, and only tensors"
    ):
        torch_file.read(write({"x": Unwanted()}, torch))
    assert not capsys.readouterr().out


@FORMATS
@pytest.mark.parametrize(
    "view", [(4, (2,), (1,)), (0, (2, 3), (3, 1)), (-1, (2,), (1,)), (4, (2,), (-1,))]
)
def test_a_tensor_that_reaches_beyond_its_numbers_is_refused(torch, write, view):
    saved = {"x": Tensor(np.zeros(5, np.float32), *view)}
    with pytest.raises(ValueError, match="'x' reaches beyond its numbers"):
        torch_file.read(write(saved, torch))


@FORMATS
@pytest.mark.parametrize(
    ("saved", "told"),
    [([1, 2], "holds a value of type list"), ({"epoch": 3}, "'epoch' is a value of type int")],
)
def test_what_is_no_dict_of_tensors_is_refused(torch, write, saved, told):
    with pytest.raises(ValueError, match=told):
        torch_file.read(write(saved, torch))


@FORMATS
def test_big_endian_numbers_are_refused(torch, write):
    with pytest.raises(ValueError, match="big-endian"):
        torch_file.read(write({"x": tensor(np.ones(2, np.float32))}, torch, byteorder=b"big"))


@FORMATS
def test_a_file_cut_short_is_refused_wherever_it_is_cut(torch, write):
    data = write({"x": tensor(np.ones(20, np.float32))}, torch)
    for end in range(0, len(data), 7):
        with pytest.raises(Exception):  # noqa: B017, PT011  (of many classes)
            torch_file.read(data[:end])


def test_a_zip_archive_of_something_else_is_refused():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ValueError, match=r"none of torch\.save"):
        torch_file.read(file.getvalue())


def test_a_pickle_of_something_else_is_refused():
    with pytest.raises(ValueError, match=r"no file of torch\.save"):
        torch_file.read(pickle.dumps({"x": 1}))
