import jax
import numpy as np
import pytest
from etils import epath
from helpers import tiny

from drl_jax import config as config_lib
from drl_jax import method
from drl_jax.errors import UserError
from drl_jax.storage import exported, npz


@pytest.fixture(scope="module")
def model():
    """Configuration, step and parameters of a small untrained network."""
    config = config_lib.load(str(tiny.DIGITS))
    config.energy.update(ch=8, mult=(1,))
    energy = method.from_config(config).energy
    params, _ = energy.normalise(*energy.init(jax.random.key(0)))
    return config, 7, params


@pytest.fixture
def file(tmp_path, model):
    file = epath.Path(tmp_path) / "model.npz"
    exported.write(*model, file)
    return file


def test_read_inverts_write(file, model):
    config, step, params = exported.read(file)
    assert (config, step) == model[:2]
    jax.tree.map(np.testing.assert_array_equal, params, model[2])
    assert {array.dtype for array in jax.tree.leaves(params)} == {np.dtype(np.float32)}


def test_half_precision_stores_two_bytes_per_parameter_of_11_significant_bits(tmp_path, model):
    half = epath.Path(tmp_path) / "half.npz"
    exported.write(*model, half, dtype="float16")
    stored = npz.decode(half.read_bytes())
    del stored[exported.ABOUT]
    assert {array.dtype for array in stored.values()} == {np.dtype(np.float16)}
    params = exported.read(half).params
    for array, expected in zip(*map(jax.tree.leaves, (params, model[2])), strict=True):
        assert array.dtype == np.float32
        # Numbers below 2^-14 have fewer bits.
        np.testing.assert_allclose(array, expected, rtol=2**-11, atol=2**-25)


def test_a_failed_write_is_one_line(model, tmp_path):
    with pytest.raises(UserError, match=r"^cannot write to .*nonesuch.*$"):
        exported.write(*model, epath.Path(tmp_path) / "nonesuch" / "model.npz")


def flip(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGES = {
    "half": lambda content: content[: len(content) // 2],
    "empty": lambda _: b"",
    "text": lambda _: b"no model",
    "flipped": flip,
    "arrays": lambda _: npz.encode({"samples": np.zeros(3)}),
    "other JSON": lambda _: npz.encode({exported.ABOUT: np.array("[1]")}),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_file_that_is_not_an_exported_model_is_rejected_in_one_line(file, damage):
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=r"^.*model\.npz is damaged or not an .*$"):
        exported.read(file)


def test_a_missing_file_is_reported(tmp_path):
    with pytest.raises(UserError, match=r"no exported model .*nonesuch"):
        exported.read(epath.Path(tmp_path) / "nonesuch.npz")


def test_an_export_of_another_network_is_rejected_in_one_line(file):
    """Such as one with gains that are separate from their kernels."""
    arrays = npz.decode(file.read_bytes())
    gains = {"params/level_0_block_0/conv2/g": np.ones(8, np.float32)}
    file.write_bytes(npz.encode(arrays | gains))
    with pytest.raises(UserError, match=r"^the parameters in .*model\.npz do not fit.*$"):
        exported.read(file)
