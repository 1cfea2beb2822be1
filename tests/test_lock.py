import os
import re
import signal
import socket
import subprocess
import sys

import pytest
from etils import epath
from helpers import tiny

from drl_jax.errors import UserError
from drl_jax.storage import lock


@pytest.fixture
def workdir(tmp_path):
    return epath.Path(tmp_path)


def acquire(workdir):
    with lock.held(workdir):
        pass


def test_a_second_run_is_refused_with_host_and_process_of_the_first(workdir):
    with lock.held(workdir):
        with pytest.raises(UserError) as raised:
            acquire(workdir)
        holder = rf"process {os.getpid()} on {re.escape(socket.gethostname())}, since"
        assert re.search(
            rf"using {re.escape(str(workdir))} \({holder} [^\n]*\)", str(raised.value)
        )
        with pytest.raises(UserError):  # the refused run has not removed the lock
            acquire(workdir)


def test_the_lock_ends_with_the_run_and_leaves_no_file(workdir):
    for _ in range(2):
        acquire(workdir)
    assert list(workdir.iterdir()) == []


def test_runs_in_different_directories_do_not_disturb_each_other(workdir):
    for name in ("a", "b"):
        (workdir / name).mkdir()
    with lock.held(workdir / "a"), lock.held(workdir / "b"):
        pass


def test_a_bucket_is_not_locked():
    acquire(epath.Path("gs://nonesuch/run"))


HOLD = """
import sys
from etils import epath
from drl_jax.storage import lock

with lock.held(epath.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
def test_a_killed_run_leaves_no_lock_behind(workdir):
    command = [sys.executable, "-c", HOLD, str(workdir)]
    with subprocess.Popen(
        command,
        cwd=tiny.ROOT,
        env=tiny.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {process.pid} on "):
            acquire(workdir)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
        assert (workdir / lock.FILE).exists()
        acquire(workdir)
    assert list(workdir.iterdir()) == []
