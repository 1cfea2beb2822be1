import logging
import re

import pytest
from etils import epath

from drl_jax.errors import Interrupted, UserError
from drl_jax.storage.log_file import LogFile

log = logging.getLogger("drl_jax.training.loop")


@pytest.fixture(autouse=True)
def level(caplog):
    caplog.set_level("INFO", logger="drl_jax")


@pytest.fixture
def path(tmp_path):
    return epath.Path(tmp_path) / "log.txt"


def lines(path):
    """Returns the lines of the file without their times."""
    text = path.read_text()
    time = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "
    assert all(re.match(time, line) for line in text.splitlines())
    return re.sub(time, "", text).splitlines()


def test_the_file_has_what_was_logged_before_and_after_it_was_opened(path):
    with LogFile() as log_file:
        log.info("before")
        assert not path.exists()
        log_file.open(path)
        log.warning("after %d", 1)
        assert lines(path) == ["before", "after 1"]  # at once, for readers of a running program
    log.info("outside")
    assert lines(path) == ["before", "after 1"]


def test_a_second_run_appends(path):
    for words in ("first", "second"):
        with LogFile() as log_file:
            log_file.open(path)
            log.info(words)
    assert lines(path) == ["first", "second"]


def end(error, path=None):
    """Ends a program with an error, before or after its log has been opened."""
    with LogFile() as log_file:
        log.info("before")
        if path:
            log_file.open(path)
        raise error


def test_a_program_that_is_refused_leaves_no_file(path):
    with pytest.raises(UserError):
        end(UserError("refused"))
    assert not path.exists()


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("diverged"), "error: diverged"),
        (Interrupted(15, "step 7 is saved"), "stopped by signal 15; step 7 is saved"),
    ],
)
def test_the_last_line_says_why_the_program_ended_early(path, error, line):
    with pytest.raises(type(error)):
        end(error, path)
    assert lines(path) == ["before", line]


def test_a_file_that_cannot_be_written_is_reported_once(path, caplog):
    path.mkdir()
    with LogFile() as log_file:
        log_file.open(path)
        log.info("first")
        log.info("second")
    (warning,) = (r.message for r in caplog.records if r.levelno == logging.WARNING)
    assert warning.startswith(f"cannot write to {path}: Is a directory")
