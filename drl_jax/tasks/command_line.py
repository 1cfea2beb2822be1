"""The command line of `drl_jax.main`: flags, `--help` and checks, derived from `tasks.table`.

Nothing here loads JAX, so that a mistake is reported at once.
"""

import copy
import dataclasses
import difflib
import importlib.util
import math
import os
import re
import sys
import textwrap
import urllib.parse
import urllib.request
from collections.abc import Iterable, Sequence
from typing import Any, get_args

from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags

import drl_jax
from drl_jax import config as config_lib
from drl_jax.errors import UserError, not_installed
from drl_jax.tasks import table
from drl_jax.tasks.table import Flag, Task

PROGRAM = "python -m drl_jax.main"
WIDTH = 88  # columns of --help
INDENT = 28  # columns before the descriptions
BOOLEANS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}


@dataclasses.dataclass(frozen=True)
class Command:
    """A parsed command line.

    Attributes:
      task: the task to run.
      values: values of the task's flags and of the common ones, by name.
      changes: the arguments --config.FIELD=VALUE, and those that flags imply.
    """

    task: Task
    values: dict[str, Any]
    changes: tuple[str, ...]

    @property
    def arguments(self) -> dict[str, Any]:
        """The flags that the task's `run` takes, by name."""
        return {name: self.values[name] for name in self.task.arguments}


def parse(argv: Sequence[str]) -> Command:
    """Parses the arguments, the first of which is the name of the program.

    Raises:
      UserError: if a flag or its value is unknown or out of range, if the task does not take
        it, if the task needs another one, or if the work directory is in a bucket and the
        library that reads buckets is not installed.
    """
    program, *arguments = argv
    changes, others = _split(arguments)
    flag_values = flags.FlagValues()  # not absl's global ones, which can be defined only once
    for flag in table.all_flags().values():
        _define(flag, flag_values)
    rest = _parsed(flag_values, [program, *others])
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}: give options as --name=value")
    task = table.TASKS[flag_values.mode]
    accepted = (*table.COMMON, *task.flags)
    values = {flag.name: flag_values[flag.name].value for flag in accepted}
    given = [name for name in table.all_flags() if flag_values[name].present]
    for name in given:
        if name not in values:
            tasks = _enumerate(table.tasks_of(table.all_flags()[name]))
            raise UserError(f"--{name} is for --mode={tasks}, not for --mode={task.name}")
    for flag in accepted:
        if flag.name in task.required and not values[flag.name]:
            raise UserError(
                f"--mode={task.name} needs --{flag.name}={flag.metavar}: {flag.help}"
            )
    workdir = values["workdir"] or ""
    if workdir.startswith("gs://") and importlib.util.find_spec("tensorflow") is None:
        raise not_installed(f"--workdir={workdir}", "tensorflow")
    _require_changeable(changes, task)
    for flag in accepted:
        value = values[flag.name]
        if isinstance(value, str) and value in flag.implied:
            changes += _implied(flag, value, changes)
    if problem := task.check(values, given):
        raise UserError(problem)
    return Command(task, values, tuple(changes))


def changed(config: ConfigDict, changes: Sequence[str]) -> ConfigDict:
    """Returns the configuration after --config.FIELD=VALUE, validated.

    Raises:
      UserError: if a value has the wrong type or cannot be used.
    """
    config = copy.deepcopy(config)
    for change in changes:
        flag_values, argv = flags.FlagValues(), ["", change]
        config_flags.DEFINE_config_dict(
            "config", config, flag_values=flag_values, sys_argv=argv
        )
        try:
            flag_values(argv)
        except (flags.Error, ValueError) as error:
            example = dict(config_lib.flatten(config))[_field(change)]
            raise UserError(f"{change}: give a value such as {example!r}") from error
    config = config.copy_and_resolve_references()
    config_lib.validate(config)
    return config


def help_text(argv: Sequence[str], introduction: str) -> str | None:
    """Returns what to print if the arguments ask for help, and None if they do not.

    Args:
      argv: the arguments; those that give --mode restrict the help to one task.
      introduction: opens the help on all tasks.

    Raises:
      UserError: if there is no such task.
    """
    if not {"--help", "-help", "-h"}.intersection(argv):
        return None
    mode = flags.FlagValues()
    _define(table.MODE, mode)
    _parsed(mode, argv, known_only=True)
    if mode["mode"].present:
        return _help_on_task(table.TASKS[mode.mode])
    return _help_on_all(introduction)


def version_text(argv: Sequence[str]) -> str | None:
    """Returns what to print if the arguments ask for the version, and None if they do not."""
    return f"drl_jax {drl_jax.__version__}" if "--version" in argv else None


def show(text: str) -> None:
    """Prints a text, without an error if the reader of a pipe, such as `head`, has ended."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Python flushes stdout once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Parser(flags.ArgumentParser):
    """Converts the text of a flag of the table to its value, and checks its range."""

    def __init__(self, flag: Flag):
        self.flag = flag

    def parse(self, argument: Any) -> Any:
        """Returns the value.

        Raises:
          ValueError: if the value is not permitted; the message says what to give.
        """
        flag = self.flag
        if not isinstance(argument, str):  # absl also passes the default to this function
            return list(argument) if isinstance(argument, tuple) else argument
        if element := get_args(flag.type):
            texts = [text.strip() for text in argument.split(",")] if argument else []
            return [self._convert(text, element[0]) for text in texts]
        return self._convert(argument, flag.type)

    def _convert(self, text: str, to: type) -> Any:
        """Converts one value, or one element of a list, to the type `to`."""
        flag = self.flag
        if flag.choices and text not in flag.choices:
            raise ValueError(f"give {_enumerate(flag.choices)}")
        if to is str:
            if not text:
                raise ValueError("it is empty: give a value, or omit the flag")
            return _path(text) if flag.is_path else text
        if to is bool:
            if text.lower() not in BOOLEANS:
                raise ValueError("give true or false")
            return BOOLEANS[text.lower()]
        low = flag.minimum
        if to is float:
            return _finite(text)
        value = int(text) if re.fullmatch(r"[+-]?\d+", text) else None
        if value is None or (low is not None and value < low):
            bound = "" if low is None else f" of at least {low}"
            raise ValueError(f"{text!r} is not a whole number{bound}")
        if value > flag.maximum:
            raise ValueError(f"give a number of at most {flag.maximum}")
        return value


def _finite(text: str) -> float:
    """Returns a number.

    Raises:
      ValueError: if the text is not a number, or it is not finite.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{text!r} is not a finite number")
    return value


def _path(text: str) -> str:
    """Returns a path in which ~ is expanded, and the path of an address file:///PATH.

    Raises:
      ValueError: if the address names another machine.
    """
    if text.startswith("file:"):
        address = urllib.parse.urlsplit(text)
        if address.netloc not in ("", "localhost"):
            raise ValueError(f"{address.netloc!r} is another machine: give a path")
        return urllib.request.url2pathname(address.path)
    return str(epath.Path(text).expanduser()) if text.startswith("~") else text


def _parsed(flag_values: flags.FlagValues, argv: Sequence[str], **options: Any) -> list[str]:
    """Parses the arguments and returns those that are not flags.

    Raises:
      UserError: if a flag is unknown, or its value is missing or not permitted.
    """
    try:
        return flag_values(argv, **options)
    except flags.UnrecognizedFlagError as error:
        similar = difflib.get_close_matches(error.flagname, flag_values, n=1)
        hint = f"did you mean --{similar[0]}?" if similar else "--help lists all flags"
        raise UserError(f"--{error.flagname} is unknown: {hint}") from error
    except (flags.Error, ValueError) as error:
        message = str(error).removeprefix("flag ")
        if match := re.fullmatch(r"Missing value for flag (\S+)", message):
            message = f"{match[1]} has no value: give {match[1]}=VALUE"
        raise UserError(message) from error


def _define(flag: Flag, flag_values: flags.FlagValues) -> None:
    """Defines a flag of the table."""
    if flag.type is bool:
        flags.DEFINE_boolean(flag.name, flag.default, flag.help, flag_values=flag_values)
        flag_values[flag.name].parser = _Parser(flag)
    else:
        flags.DEFINE(_Parser(flag), flag.name, flag.default, flag.help, flag_values)


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the arguments --config.FIELD=VALUE, then all others.

    A value that follows --NAME as an argument of its own is joined to it by "=".
    """
    changes, others = [], []
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        lacks_value = re.fullmatch(r"--?(?!no)[a-zA-Z][^=]*", argument)
        if lacks_value and remaining and not re.match("--?([a-zA-Z]|$)", remaining[0]):
            argument += f"={remaining.pop(0)}"
        if re.match(r"--?(no)?config\.", argument):
            changes.append(argument)
        else:
            others.append(argument)
    return changes, others


def _require_changeable(changes: Iterable[str], task: Task) -> None:
    """Raises unless the changed fields exist, and the task may change them.

    Raises:
      UserError: naming the change.
    """
    known = dict(config_lib.flatten(config_lib.default()))
    for change in changes:
        field = _field(change)
        if field not in known:
            raise UserError(f"{change}: {config_lib.unknown_field(field)}")
        if not task.may_change(field):
            raise UserError(
                f"{change}: --mode={task.name} cannot change this field; it can change "
                f"{_changeable(task)}"
            )


def _implied(flag: Flag, value: str, changes: Iterable[str]) -> list[str]:
    """Returns the changes of the configuration that this value of a flag implies.

    Raises:
      UserError: naming a change that contradicts them.
    """
    fields = flag.implied[value]
    for change in changes:
        wanted = fields.get(field := _field(change), "")
        if field in fields and change.partition("=")[2] != str(wanted):
            says = "takes this from training" if wanted is None else f"sets it to {wanted}"
            raise UserError(f"{change}: --{flag.name}={value} {says}; omit one of the two")
    return [f"--config.{name}={v}" for name, v in fields.items() if v is not None]


def _field(change: str) -> str:
    """Returns the name of the field that --config.FIELD=VALUE changes."""
    return re.sub(r"^--?(no)?config\.", "", change.partition("=")[0])


def _changeable(task: Task) -> str:
    """Returns a description of the fields that --config.FIELD=VALUE may change."""

    def names(fields: Sequence[str]) -> str:
        patterns = [f"{field}*" if field.endswith(".") else field for field in fields]
        return _enumerate(patterns, "and")

    if not task.changeable:
        return "no field"
    if task.changeable != ("",):
        return names(task.changeable)
    return f"all fields except {names(task.fixed)}" if task.fixed else "all fields"


def _help_on_all(introduction: str) -> str:
    """Returns the help on all tasks; each flag appears once."""
    shared = [flag for flag in table.all_flags().values() if len(table.tasks_of(flag)) > 1]
    lines = [introduction.strip(), "", "Flags of all tasks:"]
    lines += [_flag_line(flag) for flag in (table.MODE, table.WORKDIR)]
    lines += [_change_line("--mode=TASK --help lists the fields that a task can change")]
    lines += [_flag_line(flag) for flag in table.JOB]
    lines += [_line("--version", "Prints the version of drl_jax.")]
    lines += ["", "Flags of several tasks:"]
    lines += [
        _flag_line(flag, f"[{', '.join(table.tasks_of(flag))}] {flag.help}") for flag in shared
    ]
    lines += ["", "Tasks, with their own flags:"]
    for task in table.TASKS.values():
        lines.append(_line(task.name, task.help))
        lines += [_flag_line(flag, indent=4) for flag in task.flags if flag not in shared]
    return "\n".join(lines)


def _help_on_task(task: Task) -> str:
    """Returns the help on one task."""
    flags_of_task = {flag.name: flag for flag in (*table.COMMON, *task.flags)}
    mode = "" if task.name == table.MODE.default else f" --mode={task.name}"
    needed = "".join(f" --{name}={flags_of_task[name].metavar}" for name in task.required)
    lines = [f"--mode={task.name}: {task.help}", "", f"{PROGRAM}{mode}{needed}"]
    if task.flags:
        lines += ["", f"Flags of {task.name}:"]
        lines += [_flag_line(flag, task=task) for flag in task.flags]
    lines += ["", "Flags of all tasks:"]
    lines += [_flag_line(flag, task=task) for flag in (table.MODE, table.WORKDIR)]
    if task.changeable:
        lines.append(_change_line(f"this task can change {_changeable(task)}"))
    lines += [_flag_line(flag) for flag in table.JOB]
    return "\n".join(lines)


def _flag_line(flag: Flag, text: str = "", indent: int = 2, task: Task | None = None) -> str:
    """Returns the help on one flag.

    Args:
      flag: the flag.
      text: description of the flag; by default its own.
      indent: spaces before the flag.
      task: the task whose default is shown; None for the defaults of all tasks.
    """
    left = f"--[no]{flag.name}" if flag.type is bool else f"--{flag.name}={flag.metavar}"
    default = ",".join(flag.default) if isinstance(flag.default, tuple) else flag.default
    if isinstance(flag.default_help, str):
        default = flag.default_help or default
    elif task:
        default = flag.default_help.get(task.name)
    else:
        default = "; ".join(f"for {name}, {text}" for name, text in flag.default_help.items())
        needed = any(flag.name in task.required for task in table.TASKS.values())
        default += "; required by the others" if needed else ""
    required = flag.name in task.required if task else default is None
    ending = "required" if required else f"default: {default}"
    return _line(left, f"{text or flag.help} ({ending}).", indent)


def _change_line(fields: str) -> str:
    """Returns the help on --config.FIELD=VALUE; `fields` says which fields can change."""
    text = f"Changes a field of the configuration (drl_jax/config.py); {fields}."
    return _line("--config.FIELD=VALUE", text)


def _line(left: str, text: str, indent: int = 2) -> str:
    """Returns one entry of the help: `left`, and in the right column `text`, wrapped."""
    left = f"{' ' * indent}{left}"
    wrapped = textwrap.fill(
        text,
        WIDTH,
        initial_indent=f"{left:{INDENT}}" if len(left) < INDENT else " " * INDENT,
        subsequent_indent=" " * INDENT,
        break_on_hyphens=False,
    )
    return wrapped if len(left) < INDENT else f"{left}\n{wrapped}"


def _enumerate(words: Sequence[str], conjunction: str = "or") -> str:
    """Returns the words as 'a, b or c'."""
    *first, last = words
    return f"{', '.join(first)} {conjunction} {last}" if first else last
