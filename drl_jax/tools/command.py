"""What the tools have in common: their command line, and their clock."""

import logging
import sys
import time
from collections.abc import Callable, Sequence

import jax
from absl import flags

from drl_jax.errors import UserError
from drl_jax.runtime import cpu_devices


def set_up() -> None:
    """Shows the log, and makes one device per CPU core, for tools that train."""
    logging.basicConfig(format="%(message)s", level=logging.ERROR, force=True)
    logging.getLogger("drl_jax").setLevel(logging.INFO)
    if not cpu_devices.set_by_user():
        jax.config.update("jax_num_cpu_devices", cpu_devices.count())


def execute(
    tool: Callable[[], None], values: flags.FlagValues, argv: Sequence[str], description: str
) -> int:
    """Parses the options of a tool, runs it, and returns the exit status.

    It is 1 after a `UserError`, which is printed as one line, and 130 after Ctrl-C.

    Args:
      tool: what to do when `values` have been parsed.
      values: as `parse` takes it.
      argv: likewise.
      description: likewise.
    """
    try:
        if parse(values, argv, description):
            tool()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def parse(values: flags.FlagValues, argv: Sequence[str], description: str) -> bool:
    """Parses the options of a tool, or prints its help.

    Args:
      values: the tool's flags, which receive the values.
      argv: name of the program, and its options.
      description: what `--help` prints before the flags.

    Returns:
      whether the tool should run; False if the user asked for help.

    Raises:
      UserError: if an option is unknown, has a wrong value, or is not an option.
    """
    if {"--help", "-help", "-h"}.intersection(argv):
        print(description, *(f"--{name:8} {values[name].help}" for name in values), sep="\n")
        return False
    try:
        rest = values(list(argv))
    except flags.Error as error:
        raise UserError(" ".join(str(error).split())) from error
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}: options are --name=value")
    return True


def clock() -> float:
    """Returns the time that training is measured in [s]; only differences have a meaning.

    It is the CPU time of this process on CPUs, and wall-clock time on accelerators.
    """
    on_cpu = jax.devices()[0].platform == "cpu"
    return time.process_time() if on_cpu else time.perf_counter()
