"""Folders of results: those with different settings never mix."""

import json

import numpy as np
import pytest
from etils import epath

from drl_jax.errors import Interrupted, UserError
from drl_jax.storage import results


@pytest.fixture
def path(tmp_path):
    return epath.Path(tmp_path) / "samples" / "step_5"


def write(path, settings, name):
    """Writes a file to the folder of results with these settings, and returns the folder."""
    with results.folder(path, settings) as folder:
        (folder / name).touch()
    return folder


def fail(path, settings, error):
    """Raises the error when some results have been written."""
    with results.folder(path, settings) as folder:
        (folder / "b").touch()
        raise error


def files(folder):
    return sorted(file.name for file in folder.iterdir())


def test_equal_settings_share_a_folder_and_others_get_their_own(path):
    first = {"seed": 0, "sampler": "langevin", "leapfrog": (5, 2)}
    second, third = first | {"sampler": "hmc"}, first | {"leapfrog": (5, 3)}
    assert write(path, first, "a") == path
    assert write(path, second, "b") == path.parent / "step_5_2"
    assert write(path, third, "c") == path.parent / "step_5_3"
    assert write(path, first, "d") == path
    assert write(path, second, "e") == path.parent / "step_5_2"
    assert [files(folder) for folder in sorted(path.parent.iterdir())] == [
        ["a", "d", "settings.json"],
        ["b", "e", "settings.json"],
        ["c", "settings.json"],
    ]
    assert json.loads((path / "settings.json").read_text()) == first | {"leapfrog": [5, 2]}


@pytest.mark.parametrize("content", [None, "{"])
def test_results_without_readable_settings_are_left_alone(path, content):
    path.mkdir(parents=True)
    (path / "000000.png").touch()
    if content:
        (path / "settings.json").write_text(content)
    assert write(path, {"seed": 0}, "a") == path.parent / "step_5_2"


def test_an_empty_folder_is_used(path):
    path.mkdir(parents=True)
    assert write(path, {"seed": 0}, "a") == path


def test_after_an_error_nothing_new_is_left(path):
    kept = write(path, {"seed": 0}, "a")
    for settings in ({"seed": 0}, {"seed": 1}):
        with pytest.raises(UserError, match="diverged"):
            fail(path, settings, UserError("diverged"))
    assert files(kept.parent) == ["step_5"]
    assert files(kept) == ["a", "b", "settings.json"]


def test_after_a_signal_unfinished_results_are_kept(path):
    with pytest.raises(Interrupted):
        fail(path, {}, Interrupted(15, "nothing is saved"))
    assert files(path) == ["b", "settings.json"]


def test_a_folder_that_cannot_be_created_is_a_user_error(path):
    path.parent.touch()
    with pytest.raises(UserError, match=str(path)):
        write(path, {}, "a")


def test_a_digest_depends_on_every_value():
    arrays = {"a": np.zeros(3), "b": [np.ones((2, 2))]}
    digest = results.digest(arrays)
    assert results.digest({"a": np.zeros(3), "b": [np.ones((2, 2))]}) == digest
    for changed in ({**arrays, "a": np.array([0, 0, 1e-9])}, {**arrays, "b": [np.eye(2)]}):
        assert results.digest(changed) != digest
