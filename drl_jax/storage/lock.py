"""The lock of a work directory, so that two runs do not write to it at the same time.

It is the operating system's lock of an open file (flock), which ends with the process, however
that ends: a killed run leaves no lock behind. On Linux it also holds between the machines that
share a folder by NFS. In buckets, on Windows, and on file systems without locks, nothing is
checked.
"""

import contextlib
import importlib.util
import os
import socket
import time
from collections.abc import Iterator

import jax
from etils import epath

from drl_jax.errors import UserError
from drl_jax.runtime import processes

FILE = ".lock"  # in the work directory while a run is using it


@contextlib.contextmanager
def held(workdir: epath.Path) -> Iterator[None]:
    """Holds the lock of a work directory; of several processes, process 0 does for all.

    Raises:
      UserError: in every process, if another run holds it.
    """
    with contextlib.ExitStack() as stack:
        other = None if jax.process_index() else _acquire(workdir / FILE, stack)
        other = processes.broadcast_from_first(other)
        if other is not None:
            raise UserError(
                f"another run is using {workdir} ({other}): wait until it ends, stop it, or "
                "give another --workdir"
            )
        yield


def _acquire(path: epath.Path, stack: contextlib.ExitStack) -> str | None:
    """Acquires the lock until the stack is closed, which also removes the file.

    Returns:
      None, or a description of the run that holds the lock.
    """
    if "://" in os.fspath(path) or importlib.util.find_spec("fcntl") is None:
        return None
    import fcntl

    holder = f"process {os.getpid()} on {socket.gethostname()}, since {time.ctime()}"
    file = stack.enter_context(path.open("a"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return path.read_text()
    except OSError:  # this file system has no locks
        path.unlink(missing_ok=True)
        return None
    if not path.exists():  # the run that held it has just ended, and removed the file
        return "which is ending"
    stack.callback(path.unlink, missing_ok=True)
    file.truncate(0)
    file.write(holder)
    file.flush()
    return None
