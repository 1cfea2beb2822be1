"""What the tools have in common: their command line, their clock, and files of results."""

import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import flags
from etils import epath

from drl_jax.errors import UserError, as_user_error
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


def read_rows(
    file: epath.Path, settings: dict[str, Any], missing: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Returns the rows of a table in a file of results, and none if there is no such file.

    Args:
      file: JSON file with the fields `settings` and `rows`.
      settings: everything on which the rows depend, as JSON values by name.
      missing: settings that files of earlier versions lack, and the values that they had.

    Raises:
      UserError: if the file cannot be read, or is that of other settings.
    """
    with as_user_error(f"cannot read {file}"):
        if not file.exists():
            return []
        results = json.loads(file.read_text())
        found, rows = (missing or {}) | results["settings"], results["rows"]
    if found != settings:
        raise UserError(
            f"{file} has results with the settings {found}, not {settings}: give those, use "
            "another --workdir, or remove the file"
        )
    return rows
