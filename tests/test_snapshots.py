import math
import os
import re
import signal
import zlib

import numpy as np
import pytest
from etils import epath

from drl_jax.errors import Interrupted, UserError
from drl_jax.storage import npz, snapshots
from drl_jax.storage.snapshots import Autosave, Snapshot

SNAPSHOT = Snapshot(
    {"step": 3, "none": None, "name": "ä", "list": [1.5, math.inf]},
    {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "empty": np.zeros((4, 0))},
)
SETTINGS = {"levels": (0, 3), "seed": 1}


@pytest.fixture
def path(tmp_path):
    return epath.Path(tmp_path) / "work"


def assert_same(snapshot, expected=SNAPSHOT):
    assert snapshot.numbers == expected.numbers
    assert snapshot.arrays.keys() == expected.arrays.keys()
    for name, array in snapshot.arrays.items():
        np.testing.assert_array_equal(array, expected.arrays[name], strict=True)


def test_read_returns_what_was_written_last(path):
    assert snapshots.read(path, SETTINGS) is None
    snapshots.write(path, Snapshot({}, {}), {})
    snapshots.write(path, SNAPSHOT, SETTINGS)
    assert_same(snapshots.read(path, SETTINGS))
    assert [p.name for p in path.parent.iterdir()] == ["work"]


def test_any_damage_that_matters_is_one_clear_line(path):
    """Flips in fields that no reader uses, such as time stamps, change nothing."""
    snapshots.write(path, SNAPSHOT, SETTINGS)
    content = path.read_bytes()
    harmless = 0
    for i in range(len(content)):
        path.write_bytes(content[:i] + bytes([content[i] ^ 16]) + content[i + 1 :])
        try:
            snapshot, message = snapshots.read(path, SETTINGS), ""
        except UserError as error:
            snapshot, message = None, str(error)
        if snapshot:
            assert_same(snapshot)
            harmless += 1
        else:
            assert re.fullmatch(".*work is damaged.*", message)
    assert harmless < len(content) / 3
    no_numbers = npz.encode(SNAPSHOT.arrays)
    shorter = (content[:n] for n in range(0, len(content), 50))
    for altered in (*shorter, b"text", no_numbers):
        path.write_bytes(altered)
        with pytest.raises(UserError, match=r"^.*work is damaged.*$"):
            snapshots.read(path, SETTINGS)


def test_a_snapshot_of_an_earlier_version_is_rejected_by_name(path):
    """Earlier versions wrote a checksum of the whole file before its content."""
    content = npz.encode(SNAPSHOT.arrays)
    path.write_bytes(zlib.crc32(content).to_bytes(4, "big") + content)
    with pytest.raises(
        UserError, match=r"^.*work was written by an earlier version.*remove.*$"
    ):
        snapshots.read(path, SETTINGS)


@pytest.mark.parametrize("earlier", [{"seed": 1}, SETTINGS | {"parts": 2}])
def test_a_snapshot_with_settings_of_other_names_is_rejected_by_name(path, earlier):
    """Earlier versions saved fewer or other settings; no --seed or old value helps then."""
    snapshots.write(path, SNAPSHOT, earlier)
    with pytest.raises(
        UserError, match=r"^.*work was written by an earlier version.*remove.*$"
    ):
        snapshots.read(path, SETTINGS)


def test_a_failed_write_is_one_clear_line(path):
    with pytest.raises(UserError, match=r"^cannot write to .*: No such file or directory$"):
        snapshots.write(path.parent / "nonesuch" / "work", SNAPSHOT, {})


def test_work_started_with_other_settings_is_rejected(path):
    snapshots.write(path, SNAPSHOT, SETTINGS)
    with pytest.raises(UserError, match=r"^.*\(seed was 1, now 2\).*--seed$"):
        snapshots.read(path, SETTINGS | {"seed": 2})


# Autosave


def numbered(step):
    """A snapshot of a step."""
    return Snapshot({"step": step}, {"x": np.full(2, step)})


def saved_step(path):
    snapshot = snapshots.read(path, SETTINGS)
    return snapshot and snapshot.numbers["step"]


def test_autosave_saves_whenever_the_last_save_is_a_minute_old(path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(snapshots.time, "monotonic", lambda: now)
    taken, found = [], []

    def snapshot(step):
        taken.append(step)
        return numbered(step)

    autosave = Autosave(path, SETTINGS)
    assert autosave.restore() is None
    now += 100  # such as for compilation: only time inside the context counts
    with autosave:
        for step in range(8):
            now += 25
            autosave.step(step, lambda step=step: snapshot(step))
            found.append(saved_step(path))
    assert found == [None, None, 2, 2, 2, 5, 5, 5]
    assert taken == [2, 5]
    assert_same(Autosave(path, SETTINGS).restore(), numbered(5))


def test_autosave_saves_on_demand(path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(snapshots.time, "monotonic", lambda: now)
    with Autosave(path, SETTINGS) as autosave:
        now = 50.0
        autosave.save(numbered(1))
        now = 100.0
        autosave.step(2, lambda: numbered(2))  # the last save is 50 seconds old
    assert saved_step(path) == 1


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_autosave_saves_and_raises_after_a_signal(path, signum):
    before = signal.getsignal(signum)
    steps = []

    def work():
        with Autosave(path, SETTINGS) as autosave:
            for step in range(10):
                if step == 3:
                    os.kill(os.getpid(), signum)
                steps.append(step)
                autosave.step(step, lambda step=step: numbered(step))

    with pytest.raises(Interrupted) as raised:
        work()
    assert raised.value.signum == signum
    assert "3" in str(raised.value)
    assert steps == [0, 1, 2, 3]
    assert saved_step(path) == 3
    assert signal.getsignal(signum) == before


def test_autosave_resumes_only_with_equal_settings(path):
    Autosave(path, SETTINGS).save(SNAPSHOT)
    assert_same(Autosave(path, SETTINGS).restore())
    with pytest.raises(UserError, match="seed was 1, now 2"):
        Autosave(path, SETTINGS | {"seed": 2}).restore()
