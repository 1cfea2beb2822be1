import io

import numpy as np
import pytest

from drl_jax.storage import npz

ARRAYS = {
    "x": np.arange(600, dtype=np.float32).reshape(20, 30),
    "empty": np.zeros((4, 0)),
    "text": np.array("ä"),
    "last": np.arange(3),
}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], strict=True)


@pytest.mark.parametrize("compress", [False, True])
def test_decode_inverts_encode(compress):
    content = npz.encode(ARRAYS, compress)
    assert_same(npz.decode(content), ARRAYS)
    with np.load(io.BytesIO(content)) as arrays:
        assert_same(dict(arrays), ARRAYS)


@pytest.mark.parametrize("compress", [False, True])
def test_no_flipped_bit_changes_an_array_silently(compress):
    """Flips in fields that no reader uses, such as time stamps, change nothing."""
    content = npz.encode(ARRAYS, compress)
    detected = 0
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        try:
            arrays = npz.decode(bytes(flipped))
        except npz.DamagedError:
            detected += 1
        else:
            assert_same(arrays, ARRAYS)
    assert detected > len(content) / 2


def test_a_long_array_whose_stored_shape_became_shorter_is_damaged():
    """NumPy stops before the end of the member, where it would compare the checksum.

    One bit of "9" makes it "1". Fails without `testzip`.
    """
    content = npz.encode({"x": np.arange(9000)})
    damaged = content.replace(b"(9000,)", b"(1000,)")
    with np.load(io.BytesIO(damaged)) as arrays:
        assert arrays["x"].shape == (1000,)
    with pytest.raises(npz.DamagedError, match=r"checksum of x\.npy"):
        npz.decode(damaged)


@pytest.mark.parametrize("compress", [False, True])
def test_no_part_of_a_file_is_a_file(compress):
    content = npz.encode(ARRAYS, compress)
    for length in range(0, len(content), 7):
        with pytest.raises(npz.DamagedError):
            npz.decode(content[:length])


def test_other_formats_are_not_npz():
    array = io.BytesIO()
    np.save(array, np.zeros(3))
    objects = io.BytesIO()
    np.savez(objects, x=np.array([{}], dtype=object))  # would be unpickled
    for content in (b"text", array.getvalue(), objects.getvalue()):
        with pytest.raises(npz.DamagedError):
            npz.decode(content)
