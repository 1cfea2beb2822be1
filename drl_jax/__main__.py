"""Runs the command line: `python -m drl_jax`, or the command `drl_jax`."""

from typing import NoReturn

from drl_jax.main import main
from drl_jax.runtime import preemption


def program() -> NoReturn:
    """Runs the command line of the process, and ends with its exit status."""
    preemption.leave(main())


if __name__ == "__main__":
    program()
