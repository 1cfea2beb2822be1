import hashlib

import jax
import numpy as np
import pytest
import safetensors.numpy
from helpers import random_inception
from helpers.torch_files import tensor, write_legacy, write_zip

from drl_jax.errors import UserError
from drl_jax.metrics import weights


def refused(path):
    """The one line that refuses a file."""
    with pytest.raises(UserError) as caught:
        weights.load(str(path))
    line = str(caught.value)
    assert "\n" not in line
    prefix = f"config.evaluation.inception_weights is {str(path)!r}: "
    assert line.startswith(prefix)
    return line.removeprefix(prefix)


def write(path, tensors, torch):
    """Writes tensors as the path's ending says."""
    if path.suffix == ".npz":
        np.savez(path, **tensors)
    elif path.suffix == ".safetensors":
        contiguous = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
        safetensors.numpy.save_file(contiguous, path)
    else:
        writer = {".pth": write_legacy, ".pt": write_zip}[path.suffix]
        path.write_bytes(writer({name: tensor(x) for name, x in tensors.items()}, torch))


@pytest.fixture
def few(monkeypatch):
    """The first and the last tensors, which from now on are all that the network has."""
    places = weights.file_places()
    few = {name: places[name] for name in places if name.startswith(("Conv2d_", "fc."))}
    monkeypatch.setattr(weights, "file_places", lambda: few)
    return {name: random_inception.tensors()[name] for name in few}


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".npz", ".safetensors"])
def test_every_format_gives_the_same_variables(tmp_path, torch, few, suffix):
    counted = few | {"Conv2d_1a_3x3.bn.num_batches_tracked": np.array(0)}
    file = tmp_path / f"weights{suffix}"
    write(file, counted, torch)
    loaded = weights.load(str(file))
    assert loaded.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    jax.tree.map(
        np.testing.assert_array_equal, loaded.variables, weights.variables("this", few)
    )
    kernel = loaded.variables["params"]["Conv2d_4a_3x3"]["conv"]["kernel"]
    stored = few["Conv2d_4a_3x3.conv.weight"]
    assert kernel.shape == (3, 3, 80, 192)
    assert kernel[0, 2, 5, 7] == stored[7, 5, 0, 2]


def test_a_file_that_is_not_there_is_told_where_to_get(tmp_path):
    line = refused(tmp_path / "pt_inception-2015-12-05-6726825d.pth")
    assert "no such file" in line
    assert "https://" in line
    assert "--config.evaluation.inception_weights" in line


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "weights.npz").mkdir()
    assert refused(tmp_path / "weights.npz").startswith("it cannot be read (")


def test_an_unknown_ending_is_refused_with_those_known(tmp_path):
    line = refused(tmp_path / "weights.h5")
    assert line == "it must end in .pth, .pt, .npz or .safetensors"


def test_a_hash_in_the_name_must_be_the_files(tmp_path):
    file = tmp_path / "inception-6726825d.npz"
    np.savez(file, x=np.zeros(3))
    found = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    assert f"begins with {found}, not 6726825d" in refused(file)
    right = file.rename(tmp_path / f"inception-{found}.npz")
    assert "does not hold the weights" in refused(right)


@pytest.mark.parametrize("suffix", [".pth", ".npz", ".safetensors"])
def test_a_damaged_file_is_refused(tmp_path, suffix):
    file = tmp_path / f"weights{suffix}"
    file.write_bytes(b"not a file of weights at all")
    assert refused(file).startswith("it cannot be read (")


def test_pickled_objects_in_an_npz_are_refused(tmp_path):
    np.savez(tmp_path / "weights.npz", x=np.array([{}], object))
    assert "allow_pickle=False" in refused(tmp_path / "weights.npz")


def faults(tensors):
    """What is told of tensors that are not right."""
    with pytest.raises(UserError) as caught:
        weights.variables("this", tensors)
    head = "this: it does not hold the weights of Inception-2015: "
    assert str(caught.value).startswith(head)
    return str(caught.value).removeprefix(head)


def test_missing_tensors_are_named(few):
    del few["fc.bias"]
    assert faults(few) == "fc.bias is missing"
    del few["fc.weight"]
    assert faults(few) == "fc.bias is missing, fc.weight is missing"


def test_of_many_faults_three_are_named_and_all_are_counted():
    assert faults({}).count("is missing") == 3
    assert faults({}).endswith(" and 469 more")


def test_wrong_shapes_are_named_with_the_right_one(few):
    changed = {"fc.weight": np.zeros((1000, 2048), np.float32)}
    assert faults(few | changed) == "fc.weight has shape (1000, 2048), not (1008, 2048)"


def test_an_unknown_tensor_is_named(few):
    tensors = few | {"AuxLogits.fc.bias": np.zeros(3)}
    assert faults(tensors) == "AuxLogits.fc.bias is unknown"


@pytest.mark.parametrize("value", [np.full(1008, np.nan), np.zeros(1008, int)])
def test_tensors_are_of_finite_floats(few, value):
    assert faults(few | {"fc.bias": value}) == "fc.bias is not of finite floats"


def test_doubles_become_float32(few):
    doubled = {name: np.float64(x) for name, x in few.items()}
    jax.tree.map(
        np.testing.assert_array_equal,
        weights.variables("this", doubled),
        weights.variables("this", few),
    )
