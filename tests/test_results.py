"""Folders of results: those with different settings never mix."""

import functools
import itertools
import json
import os
import signal

import numpy as np
import pytest
from etils import epath

from drl_jax.errors import Interrupted, UserError
from drl_jax.storage import results


@pytest.fixture
def path(tmp_path):
    return epath.Path(tmp_path) / "samples" / "step_5"


def write(path, settings, *names):
    """Writes files to the folder of results with these settings."""
    with results.folder(path, settings) as folder:
        for name in names:
            (folder / name).touch()


def fail(path, settings, error):
    """Raises the error when some results have been written."""
    with results.folder(path, settings) as folder:
        (folder / "b").touch()
        raise error


def interrupt(path, settings, signum):
    """Sends a signal when some results have been written."""
    with results.folder(path, settings) as folder:
        (folder / "b").touch()
        signal.raise_signal(signum)


def tree(path):
    """Returns the names of the files in each folder next to `path`."""
    return {
        folder.name: sorted(file.name for file in folder.iterdir())
        for folder in path.parent.iterdir()
        if folder.is_dir()
    }


def test_results_with_equal_settings_are_replaced_and_others_get_their_own_folder(path, caplog):
    """Replaced entirely: fewer samples leave none of the old ones."""
    first = {"seed": 0, "sampler": "langevin", "leapfrog": (5, 2)}
    second, third = first | {"sampler": "hmc"}, first | {"leapfrog": (5, 3)}
    for settings, names in ((first, "ab"), (second, "c"), (third, "d"), (second, "ef")):
        write(path, settings, *names)
    assert tree(path) == {
        "step_5": ["a", "b", "settings.json"],
        "step_5_2": ["e", "f", "settings.json"],
        "step_5_3": ["d", "settings.json"],
    }
    write(path, first, "g")
    assert tree(path)["step_5"] == ["g", "settings.json"]
    assert json.loads((path / "settings.json").read_text()) == first | {"leapfrog": [5, 2]}
    caplog.clear()
    with caplog.at_level("INFO", logger="drl_jax"):
        write(path, third, "h")
    assert caplog.messages == [
        f"{path} contains results with other settings",
        f"wrote all results to {path}_3",
    ]


@pytest.mark.parametrize("content", [None, "{"])
def test_results_without_readable_settings_are_left_alone(path, content):
    path.mkdir(parents=True)
    (path / "000000.png").touch()
    if content:
        (path / "settings.json").write_text(content)
    before = tree(path)
    write(path, {"seed": 0}, "a")
    assert tree(path) == before | {"step_5_2": ["a", "settings.json"]}


def test_an_empty_folder_is_used(path):
    path.mkdir(parents=True)
    write(path, {"seed": 0}, "a")
    assert tree(path) == {"step_5": ["a", "settings.json"]}


@pytest.mark.parametrize("error", [UserError("diverged"), MemoryError()])
def test_after_an_error_everything_is_as_before(path, error):
    write(path, {"seed": 0}, "a")
    for seed in (0, 1):
        with pytest.raises(type(error)):
            fail(path, {"seed": seed}, error)
    assert tree(path) == {"step_5": ["a", "settings.json"]}


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_after_a_signal_unfinished_results_are_kept_apart_and_reported(path, signum):
    write(path, {}, "a")
    with pytest.raises(Interrupted, match=f"stopped by signal {signum:d}; .*has") as found:
        interrupt(path, {}, signum)
    complete = {"step_5": ["a", "settings.json"]}
    unfinished = tree(path).keys() - complete.keys()
    assert tree(path) == complete | {name: ["b", "settings.json"] for name in unfinished}
    (name,) = unfinished
    assert str(path.parent / name) in str(found.value)
    write(path, {}, "a")
    assert tree(path) == complete


def test_a_kill_at_any_time_leaves_no_incomplete_results_under_their_final_name(
    path, monkeypatch
):
    """Replaces results, and stops before each change of a file or folder in turn."""

    class Killed(BaseException):
        """Not caught by any code that tidies up."""

    kind, write_all = type(path), functools.partial(write, path, {})

    def remove_tree(folder, missing_ok):
        for file in folder.iterdir() if folder.exists() else ():
            file.unlink()
        if folder.exists():
            os.rmdir(folder)

    write_all("a", "b")
    for changes in itertools.count():
        left = iter(range(changes))

        def counted(method, left=left):
            def change(*args, **kwargs):
                if next(left, None) is None:
                    raise Killed
                return method(*args, **kwargs)

            return change

        with monkeypatch.context() as patch:
            patch.setattr(kind, "rmtree", remove_tree)
            for name in ("mkdir", "rename", "replace", "touch", "unlink"):
                patch.setattr(kind, name, counted(getattr(kind, name)))
            try:
                write_all("c", "d")
                break
            except Killed:
                complete = ["a", "b", "settings.json"], ["c", "d", "settings.json"]
                assert tree(path).get("step_5") in (None, *complete)
    assert changes > 8
    assert tree(path) == {"step_5": ["c", "d", "settings.json"]}


def test_processes_with_different_settings_can_write_at_the_same_time(path):
    with results.folder(path, {"seed": 0}) as first:
        (first / "a").touch()
        write(path, {"seed": 1}, "b")
    assert tree(path) == {
        "step_5": ["b", "settings.json"],
        "step_5_2": ["a", "settings.json"],
    }


def test_a_second_process_with_equal_settings_is_refused_and_disturbs_nothing(path):
    with results.folder(path, {"seed": 0}) as folder:
        (folder / "a").touch()
        with pytest.raises(UserError, match=r"^another run is using \S+unfinished_\w+ \(proc"):
            write(path, {"seed": 0}, "b")
    assert tree(path) == {"step_5": ["a", "settings.json"]}


def test_what_a_killed_process_has_left_is_removed(path):
    with pytest.raises(Interrupted):
        interrupt(path, {}, signal.SIGTERM)
    (unfinished,) = path.parent.iterdir()
    (unfinished / "deep").mkdir()
    (unfinished / "deep" / "a").touch()
    write(path, {}, "c")
    assert tree(path) == {"step_5": ["c", "settings.json"]}


def test_results_that_do_not_belong_together_are_never_next_to_the_last_one(path):
    path.mkdir(parents=True)
    for name in ("metrics.json", "samples.png", "settings.json"):
        (path / name).touch()
    results.begin(path, {"seed": 1}, last="metrics.json")
    assert tree(path) == {"step_5": ["samples.png", "settings.json"]}
    assert json.loads((path / "settings.json").read_text()) == {"seed": 1}


def test_a_folder_that_cannot_be_created_is_a_user_error(path):
    path.parent.touch()
    with pytest.raises(UserError, match=f"cannot write to {path.parent}"):
        write(path, {}, "a")


def test_a_digest_depends_on_every_value():
    arrays = {"a": np.zeros(3), "b": [np.ones((2, 2))]}
    digest = results.digest(arrays)
    assert results.digest({"a": np.zeros(3), "b": [np.ones((2, 2))]}) == digest
    for changed in ({**arrays, "a": np.array([0, 0, 1e-9])}, {**arrays, "b": [np.eye(2)]}):
        assert results.digest(changed) != digest
