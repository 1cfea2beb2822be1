import io
import json

import pytest
from etils import epath

from drl_jax.errors import UserError
from drl_jax.storage import atomic


@pytest.fixture
def folder(tmp_path):
    return epath.Path(tmp_path)


@pytest.mark.parametrize("inside", ["", "deeper"])
def test_a_folder_that_cannot_be_created_is_reported(folder, inside):
    file = folder / "file"
    file.write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*file"):
        atomic.make_writable(file / inside)


def test_making_a_folder_writable_leaves_no_file_in_it(folder):
    atomic.make_writable(folder / "a" / "b")
    assert list((folder / "a" / "b").iterdir()) == []


class Full(io.FileIO):
    """A file on a disk that becomes full in the middle of each write."""

    def write(self, content):
        super().write(content[: len(content) // 2])
        raise OSError(28, "No space left on device")


def write_half(file):
    with atomic.replacing(file) as half:
        half.write(b"new")
        raise KeyboardInterrupt


def test_a_file_is_replaced_in_one_step(folder, monkeypatch):
    """After a failed write the old content is there, and no other file."""
    file = folder / "file"
    atomic.write_atomically(file, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(type(file), "open", lambda self, mode: Full(self, mode))
        with pytest.raises(UserError, match=r"cannot write to .*file: No space left"):
            atomic.write_atomically(file, b"new one")
    with pytest.raises(KeyboardInterrupt):
        write_half(file)
    assert [(path.name, path.read_bytes()) for path in folder.iterdir()] == [("file", b"old")]
    with atomic.replacing(file) as whole:
        whole.write(b"new ")
        whole.write(b"one")
        assert file.read_bytes() == b"old"
    assert [(path.name, path.read_bytes()) for path in folder.iterdir()] == [
        ("file", b"new one")
    ]


def test_json_is_written_with_a_final_newline(folder):
    values = {"step": 3, "list": [0.1, None], "name": "ä"}
    atomic.write_json(folder / "values.json", values)
    text = (folder / "values.json").read_text()
    assert json.loads(text) == values
    assert text.endswith("}\n")
    with pytest.raises(UserError, match=r"cannot write to .*nonesuch"):
        atomic.write_json(folder / "nonesuch" / "values.json", values)


def test_only_the_first_process_writes_and_removes(folder, monkeypatch):
    file = folder / "file"
    for process, content in ((1, None), (0, b"from 0"), (1, b"from 0")):
        monkeypatch.setattr(atomic.jax, "process_index", lambda process=process: process)
        atomic.write_atomically(file, f"from {process}".encode())
        assert (file.read_bytes() if file.exists() else None) == content
    atomic.remove(file)
    assert file.exists()
    monkeypatch.undo()
    for _ in range(2):  # there may be no file
        atomic.remove(file)
        assert not file.exists()
