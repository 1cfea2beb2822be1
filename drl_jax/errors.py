"""Exceptions for problems that the user can fix, reported as one line."""

import contextlib
import shlex
import sys
from collections.abc import Iterator


class UserError(ValueError):
    """A problem outside the program, which the user can fix.

    The message is one line: what is wrong, the value, what to do. `drl_jax.main` prints that
    line and exits with status 1. For all other exceptions, Python prints the traceback.
    """


class DivergenceError(UserError):
    """The loss or the energies of a training run exceed their limits or are not finite."""


class Interrupted(Exception):  # noqa: N818  (not an error)
    """A signal asked the program to stop.

    Attributes:
      signum: number of the signal.
    """

    def __init__(self, signum: int, report: str):
        """The message is "stopped by signal <signum>; <report>".

        Args:
          signum: number of the signal.
          report: what is saved.
        """
        super().__init__(f"stopped by signal {signum}; {report}")
        self.signum = signum


def resumable(step: int) -> str:
    """Returns the report of `Interrupted` if the state after a step is saved."""
    return f"step {step} is saved: the same command resumes from here"


@contextlib.contextmanager
def as_user_error(failure: str) -> Iterator[None]:
    """Re-raises any exception as a one-line `UserError`.

    Args:
      failure: what could not be done; the message is "<failure>: <reason>".

    Raises:
      UserError: if the body raises an exception of any type.
    """
    try:
        yield
    except Exception as error:  # local disks raise OSError, buckets raise TensorFlow's errors
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"{failure}: {reason}") from error


@contextlib.contextmanager
def out_of_memory_as_user_error() -> Iterator[None]:
    """Re-raises a lack of memory, on a device or the host, as a one-line `UserError`.

    Raises:
      UserError: if the body needs more memory than there is.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # JAX's error is a RuntimeError
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"there is not enough memory ({reason}): ask for fewer samples, lower "
            "--config.train.batch_size or --config.evaluation.batch_size, or raise "
            "--config.train.accumulate"
        ) from error


def not_installed(what: str, *packages: str) -> UserError:
    """Returns the error for packages that are not installed.

    Args:
      what: what needs the packages; the beginning of the message.
      packages: their names, for pip.
    """
    return UserError(
        f"{what} needs {' and '.join(packages)}, which is not installed; run "
        f"{shlex.join([sys.executable, '-m', 'pip', 'install', *packages])}"
    )
