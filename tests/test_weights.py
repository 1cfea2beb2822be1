import hashlib

import jax
import numpy as np
import pytest
from helpers import random_inception
from helpers.torch_files import save, write_legacy, write_zip

from drl_jax.errors import UserError
from drl_jax.metrics import weights


def rejection(path):
    """Returns the message with which a file is rejected, without the field and its value."""
    with pytest.raises(UserError) as caught:
        weights.load(str(path))
    line = str(caught.value)
    assert "\n" not in line
    prefix = f"config.evaluation.inception_weights is {str(path)!r}: "
    assert line.startswith(prefix)
    return line.removeprefix(prefix)


@pytest.fixture
def few(monkeypatch):
    """The first and the last tensors of the network, which here are all that it has."""
    layout = weights.file_layout()
    few = {name: layout[name] for name in layout if name.startswith(("Conv2d_", "fc."))}
    monkeypatch.setattr(weights, "file_layout", lambda: few)
    return {name: random_inception.tensors()[name] for name in few}


@pytest.mark.parametrize("suffix", weights.SUFFIXES)
@pytest.mark.parametrize("write_format", [write_legacy, write_zip])
def test_both_formats_and_suffixes_give_the_same_variables(
    tmp_path, torch, few, suffix, write_format
):
    counted = few | {"Conv2d_1a_3x3.bn.num_batches_tracked": np.array(0)}
    file = tmp_path / f"weights{suffix}"
    save(file, counted, torch, write_format)
    loaded = weights.load(str(file))
    assert loaded.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    jax.tree.map(
        np.testing.assert_array_equal, loaded.variables, weights.to_variables(few, "weights")
    )
    kernel = loaded.variables["params"]["Conv2d_4a_3x3"]["conv"]["kernel"]
    stored = few["Conv2d_4a_3x3.conv.weight"]
    assert kernel.shape == (3, 3, 80, 192)
    assert kernel[0, 2, 5, 7] == stored[7, 5, 0, 2]


def test_the_message_about_a_missing_file_says_where_to_get_it(tmp_path):
    line = rejection(tmp_path / "pt_inception-2015-12-05-6726825d.pth")
    assert "no such file" in line
    assert "https://" in line
    assert "--config.evaluation.inception_weights" in line


def test_a_folder_is_rejected(tmp_path):
    (tmp_path / "weights.pth").mkdir()
    assert "cannot read it" in rejection(tmp_path / "weights.pth")


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".h5", ""])
def test_other_suffixes_are_rejected_with_the_valid_ones(tmp_path, suffix):
    line = rejection(tmp_path / f"weights{suffix}")
    assert ".pth or .pt" in line


def test_a_hash_in_the_file_name_must_be_that_of_the_file(tmp_path, torch):
    file = tmp_path / "inception-6726825d.pth"
    save(file, {"x": np.zeros(3, np.float32)}, torch)
    actual = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    line = rejection(file)
    assert actual in line
    assert "6726825d" in line
    renamed = file.rename(tmp_path / f"inception-{actual}.pth")
    assert "not the weights of Inception-2015" in rejection(renamed)


@pytest.mark.parametrize("suffix", weights.SUFFIXES)
def test_a_damaged_file_is_rejected(tmp_path, suffix):
    file = tmp_path / f"weights{suffix}"
    file.write_bytes(b"not a file of weights at all")
    assert "cannot read it" in rejection(file)


def problems(tensors):
    """Returns the problems that the message about unsuitable tensors lists."""
    with pytest.raises(UserError) as caught:
        weights.to_variables(tensors, "title")
    start = "title: these are not the weights of Inception-2015: "
    assert str(caught.value).startswith(start)
    return str(caught.value).removeprefix(start).removesuffix(f"; {weights.DOWNLOAD_HINT}")


def test_missing_tensors_are_named(few):
    del few["fc.bias"]
    assert problems(few) == "fc.bias is missing"
    del few["fc.weight"]
    assert problems(few) == "fc.bias is missing, fc.weight is missing"


def test_three_problems_are_named_and_all_are_counted():
    assert problems({}).count("is missing") == 3
    assert problems({}).endswith(" and 469 more")


def test_wrong_shapes_are_named_with_the_right_ones(few):
    changed = {"fc.weight": np.zeros((1000, 2048), np.float32)}
    assert problems(few | changed) == "fc.weight has shape (1000, 2048), not (1008, 2048)"


def test_unknown_tensors_are_named(few):
    tensors = few | {"AuxLogits.fc.bias": np.zeros(3)}
    assert problems(tensors) == "AuxLogits.fc.bias is unknown"


@pytest.mark.parametrize("value", [np.full(1008, np.nan), np.zeros(1008, int)])
def test_tensors_must_be_finite_floating_point_numbers(few, value):
    assert "fc.bias" in problems(few | {"fc.bias": value})
    assert "finite floating-point numbers" in problems(few | {"fc.bias": value})


def test_other_float_types_become_float32(few):
    doubled = {name: x.astype(np.float64) for name, x in few.items()}
    jax.tree.map(
        np.testing.assert_array_equal,
        weights.to_variables(doubled, "title"),
        weights.to_variables(few, "title"),
    )
