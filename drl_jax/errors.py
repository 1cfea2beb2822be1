"""Exceptions for problems that the user can fix, reported as one line."""

import contextlib
from collections.abc import Iterator


class UserError(ValueError):
    """A problem outside the program, which the user can fix.

    The message is one line: what is wrong, the value, what to do. `drl_jax.main` prints that
    line and exits with status 1. For all other exceptions, Python prints the traceback.
    """


class Interrupted(Exception):  # noqa: N818  (not an error: the run can be resumed)
    """A signal asked the run to stop, and its state was saved.

    Attributes:
      signum: number of the signal.
    """

    def __init__(self, signum: int, step: int):
        super().__init__(f"stopped by signal {signum}; step {step} is saved")
        self.signum = signum


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
