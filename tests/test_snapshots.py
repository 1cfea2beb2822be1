import math

import numpy as np
import pytest
from etils import epath

from drl_jax import snapshots
from drl_jax.errors import UserError
from drl_jax.snapshots import Snapshot

SNAPSHOT = Snapshot(
    {"step": 3, "none": None, "name": "ä", "list": [1.5, math.inf]},
    {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "empty": np.zeros((4, 0))},
)
SETTINGS = {"levels": (0, 3), "seed": 1}


@pytest.fixture
def path(tmp_path):
    return epath.Path(tmp_path) / "work"


def test_what_is_written_is_read(path):
    assert snapshots.read(path, SETTINGS) is None
    snapshots.write(path, Snapshot({}, {}), {})
    snapshots.write(path, SNAPSHOT, SETTINGS)
    numbers, arrays = snapshots.read(path, SETTINGS)
    assert numbers == SNAPSHOT.numbers
    assert arrays.keys() == SNAPSHOT.arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, SNAPSHOT.arrays[name])
        assert array.dtype == SNAPSHOT.arrays[name].dtype
    assert [p.name for p in path.parent.iterdir()] == ["work"]


def test_any_damage_is_one_clear_line(path):
    snapshots.write(path, SNAPSHOT, SETTINGS)
    whole = path.read_bytes()
    flipped = (whole[:i] + bytes([whole[i] ^ 16]) + whole[i + 1 :] for i in range(len(whole)))
    shorter = (whole[:n] for n in range(0, len(whole), 50))
    for content in [*flipped, *shorter, b"text", whole + b" "]:
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"^.*work is damaged: put back a copy, .*$"):
            snapshots.read(path, SETTINGS)


def test_what_cannot_be_written_is_one_clear_line(path):
    with pytest.raises(UserError, match=r"^cannot write to .*: No such file or directory$"):
        snapshots.write(path.parent / "nonesuch" / "work", SNAPSHOT, {})


def test_work_that_was_begun_with_other_settings_is_refused(path):
    snapshots.write(path, SNAPSHOT, SETTINGS)
    told = r"^the chains in .* \(seed was 1, now 2\): give another --seed or the old values$"
    with pytest.raises(UserError, match=told):
        snapshots.read(path, SETTINGS | {"seed": 2})
