"""Files as torch.save writes them, made here without PyTorch.

The two writers below were seen to agree with PyTorch 2.15 in what the reader sees.
"""

import collections
import io
import pickle
import zipfile

import numpy as np
import pytest
from helpers.torch_files import STORAGES, Tensor, tensor, write_legacy, write_zip

from drl_jax.metrics import torch_file

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
