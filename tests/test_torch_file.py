"""Reads files in both formats of torch.save, written by `helpers.torch_files`."""

import collections
import io
import pickle
import zipfile

import numpy as np
import pytest
from helpers.torch_files import STORAGES, Tensor, tensor, write_legacy, write_zip

from drl_jax.storage import torch_file

FORMATS = pytest.mark.parametrize("write", [write_zip, write_legacy])


@FORMATS
@pytest.mark.parametrize("dtype", STORAGES)
def test_tensors_of_every_dtype_and_shape_are_read(torch, write, dtype):
    saved = {
        "matrix": np.arange(6, dtype=dtype).reshape(2, 3),
        "kernel": np.arange(24, dtype=dtype).reshape(1, 2, 3, 4),
        "number": np.array(7, dtype),
        "empty": np.zeros((0, 3), dtype),
    }
    data = write({name: tensor(array) for name, array in saved.items()}, torch)
    found = torch_file.read(data)
    assert found.keys() == saved.keys()
    for name, array in saved.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


@FORMATS
def test_tensors_can_share_a_storage_and_have_any_strides(torch, write):
    storage = np.arange(10, dtype=np.float32)
    saved = {
        "transposed": Tensor(storage, 0, (2, 3), (1, 2)),
        "tail": Tensor(storage, 7, (3,), (1,)),
    }
    found = torch_file.read(write(saved, torch))
    np.testing.assert_array_equal(found["transposed"], [[0, 2, 4], [1, 3, 5]])
    np.testing.assert_array_equal(found["tail"], [7, 8, 9])


@FORMATS
def test_a_state_dict_can_be_an_ordered_dict_with_an_attribute(torch, write):
    saved = collections.OrderedDict(x=tensor(np.ones(2, np.float32)))
    saved._metadata = {"": {"version": 1}}
    np.testing.assert_array_equal(torch_file.read(write(saved, torch))["x"], [1, 1])


class CallsPrint:
    def __reduce__(self):
        return print, ("this must never be printed",)


@FORMATS
def test_a_pickle_that_calls_another_function_is_rejected_before_the_call(torch, write, capsys):
    with pytest.raises(pickle.UnpicklingError, match=r"__builtin__\.print"):
        torch_file.read(write({"x": CallsPrint()}, torch))
    assert not capsys.readouterr().out


@FORMATS
@pytest.mark.parametrize(
    "view", [(4, (2,), (1,)), (0, (2, 3), (3, 1)), (-1, (2,), (1,)), (4, (2,), (-1,))]
)
def test_a_tensor_with_elements_outside_its_storage_is_rejected(torch, write, view):
    saved = {"x": Tensor(np.zeros(5, np.float32), *view)}
    with pytest.raises(ValueError, match="'x' has elements outside its storage"):
        torch_file.read(write(saved, torch))


@FORMATS
@pytest.mark.parametrize(
    ("saved", "message"),
    [([1, 2], "a list, not a state dict"), ({"epoch": 3}, "'epoch' is a int, not a tensor")],
)
def test_values_other_than_a_dict_of_tensors_are_rejected(torch, write, saved, message):
    with pytest.raises(ValueError, match=message):
        torch_file.read(write(saved, torch))


@FORMATS
def test_big_endian_numbers_are_rejected(torch, write):
    with pytest.raises(ValueError, match="big-endian"):
        torch_file.read(write({"x": tensor(np.ones(2, np.float32))}, torch, byteorder=b"big"))


@FORMATS
def test_a_truncated_file_is_rejected_wherever_it_ends(torch, write):
    data = write({"x": tensor(np.ones(20, np.float32))}, torch)
    for end in range(0, len(data), 7):
        with pytest.raises(Exception):  # noqa: B017, PT011  (many classes)
            torch_file.read(data[:end])


def test_another_zip_archive_is_rejected():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ValueError, match=r"zip archive that torch\.save did not write"):
        torch_file.read(file.getvalue())


def test_another_pickle_is_rejected():
    with pytest.raises(ValueError, match=r"torch\.save did not write it"):
        torch_file.read(pickle.dumps({"x": 1}))
