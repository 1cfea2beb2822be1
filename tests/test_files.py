import io

import pytest
from etils import epath

from drl_jax import files
from drl_jax.errors import UserError


@pytest.fixture
def folder(tmp_path):
    return epath.Path(tmp_path)


@pytest.mark.parametrize("inside", ["", "deeper"])
def test_a_folder_that_cannot_be_made_is_told(folder, inside):
    file = folder / "file"
    file.write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*file"):
        files.make_writable(file / inside)


def test_a_folder_is_made_writable_without_a_trace(folder):
    files.make_writable(folder / "a" / "b")
    assert list((folder / "a" / "b").iterdir()) == []


class Full(io.FileIO):
    """A file on a disk that is full after half of what is written."""

    def write(self, content):
        super().write(content[: len(content) // 2])
        raise OSError(28, "No space left on device")


def write_half(file):
    with files.whole(file) as half:
        half.write(b"new")
        raise KeyboardInterrupt


def test_a_file_is_replaced_whole(folder, monkeypatch):
    """Where the write stops half way the old content stays, and nothing beside it."""
    file = folder / "file"
    files.write_whole(file, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(type(file), "open", lambda self, mode: Full(self, mode))
        with pytest.raises(UserError, match=r"cannot write to .*file: No space left"):
            files.write_whole(file, b"new one")
    with pytest.raises(KeyboardInterrupt):
        write_half(file)
    assert [(path.name, path.read_bytes()) for path in folder.iterdir()] == [("file", b"old")]
    with files.whole(file) as whole:
        whole.write(b"new ")
        whole.write(b"one")
        assert file.read_bytes() == b"old"
    assert [(path.name, path.read_bytes()) for path in folder.iterdir()] == [
        ("file", b"new one")
    ]


def test_of_several_processes_only_the_first_one_writes_and_removes(folder, monkeypatch):
    file = folder / "file"
    for process, content in ((1, None), (0, b"of 0"), (1, b"of 0")):
        monkeypatch.setattr(files.jax, "process_index", lambda process=process: process)
        files.write_whole(file, f"of {process}".encode())
        assert (file.read_bytes() if file.exists() else None) == content
    files.remove(file)
    assert file.exists()
    monkeypatch.undo()
    files.remove(file)
    assert not file.exists()
