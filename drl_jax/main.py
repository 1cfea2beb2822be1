"""Learns, samples and measures energy-based models by diffusion recovery likelihood.

python -m drl_jax.main --config=configs/digits.py --workdir=DIR
python -m drl_jax.main --mode=sample --workdir=DIR
"""

import difflib
import logging
import os
import sys
import time
from collections.abc import Sequence

from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags
from tqdm.contrib.logging import logging_redirect_tqdm

from drl_jax import config as config_lib
from drl_jax.errors import Interrupted, UserError

# Flags that mean something to some modes only.
ONLY_OF = {"config": ("train",), "num_samples": ("sample",), "seed": ("sample",)}

log = logging.getLogger("drl_jax")


def main(argv: Sequence[str]) -> int:
    """Runs one mode and returns the exit status; a user's mistake is one line on stderr."""
    logging.basicConfig(format="%(message)s", level=logging.ERROR)
    log.setLevel(logging.INFO)
    # Orbax tells every exception twice, the first time through absl and in many lines.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        if {"--help", "-help", "-h"}.intersection(argv):
            values = define_flags([])
            print(__doc__, *(f"--{name:12} {values[name].help}" for name in values), sep="\n")
        else:
            with logging_redirect_tqdm():  # so that no line tears a bar
                run(parse(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Interrupted as interrupted:
        log.info("%s: the same command goes on from here", interrupted)
        return 128 + interrupted.signum
    except KeyboardInterrupt:  # outside training, where there is nothing to save
        return 130
    return 0


def run(values: flags.FlagValues) -> None:
    """Runs the mode that the flags name."""
    prepare_jax()
    from drl_jax import modes  # JAX and Orbax load here, after the flags are known good

    if values.mode == "train":
        modes.train(values.config, pick_workdir(values))
    elif values.mode == "sample":
        modes.sample(pick_workdir(values), values.num_samples, values.seed)
    else:
        modes.evaluate(pick_workdir(values))


def define_flags(argv: Sequence[str]) -> flags.FlagValues:
    """Returns this program's flags, unparsed; `argv` tells which config fields it changes.

    They are a set of their own, not absl's global one, so that `main` can be called again.
    """
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config",
        None,
        "What to train: a file of configs/; --config.FIELD=VALUE after it changes a field.",
        values,
        sys_argv=list(argv),
    )
    modes = ["train", "sample", "evaluate"]
    flags.DEFINE_enum("mode", "train", modes, "What to do (train).", flag_values=values)
    flags.DEFINE_string(
        "workdir", None, "Where the run lives; a bucket will do.", flag_values=values
    )
    flags.DEFINE_integer(
        "num_samples", 100, "Of sample: how many (100).", lower_bound=1, flag_values=values
    )
    flags.DEFINE_integer(
        "seed", 0, "Of sample: equal seeds, equal samples (0).", 0, 2**32 - 1, values
    )
    return values


def parse(argv: Sequence[str]) -> flags.FlagValues:
    """Parses the command line, config file included.

    Raises:
      UserError: an unknown flag, mode, config file or config field, or a bad value.
    """
    check_config_flags(argv)
    values = define_flags(argv)
    try:
        rest = values(argv)
    except flags.Error as error:
        # Of a config file that raises, absl shows the whole traceback.
        lines = str(error).strip().splitlines()
        raise UserError(" ".join(dict.fromkeys((lines[0], lines[-1])))) from error
    except Exception as error:  # a config file is a program, and may raise anything
        raise UserError(f"--config: {type(error).__name__}: {error}") from error
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}: every option is --name=value")
    for name, modes in ONLY_OF.items():
        if values[name].present and values.mode not in modes:
            raise UserError(f"--{name} is for --mode={modes[0]}, not for --mode={values.mode}")
    if values.mode == "train":
        if not values["config"].present:
            raise UserError("--mode=train needs --config, such as --config=configs/digits.py")
        if not isinstance(values.config, ConfigDict):
            raise UserError("--config: its get_config() gives no ConfigDict")
        config_lib.validate(values.config)
    elif not values.workdir:
        raise UserError(f"--mode={values.mode} needs the --workdir of a trained model")
    return values


def check_config_flags(argv: Sequence[str]) -> None:
    """Refuses a config file or field that does not exist, before ml_collections opens it.

    Raises:
      UserError: saying what does.
    """
    known = [f"config.{name}" for name, _ in config_lib.flatten(config_lib.default())]
    changed, file = None, None
    for arg, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = arg.lstrip("-").partition("=")
        if not arg.startswith("-"):
            continue
        if name == "config":
            file = value if equals else following
            path = epath.Path(file.partition(":")[0])
            if path.suffix != ".py" or not path.is_file():
                raise UserError(f"--config={file}: there is no such Python file")
        elif name.startswith(("config.", "noconfig.")):
            changed = name.removeprefix("no")
            if changed not in known:
                near = difflib.get_close_matches(changed, known, n=1)
                hint = f"; did you mean --{near[0]}?" if near else ""
                raise UserError(f"--{changed}: the config has no such field{hint}")
    if changed and not file:
        raise UserError(f"--{changed} changes a field of --config=FILE, which is not given")


def pick_workdir(values: flags.FlagValues) -> epath.Path:
    """Returns --workdir, or picks one under runs/ and says which."""
    if values.workdir:
        return epath.Path(values.workdir).expanduser()
    file = epath.Path(config_flags.get_config_filename(values["config"]))
    workdir = epath.Path("runs") / f"{file.stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    log.info("no --workdir given: using %s", workdir)
    return workdir


def prepare_jax() -> None:
    """Keeps compiled programs between runs, and TensorFlow (behind clu) quiet."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # errors alone
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # else it announces itself
    cache = epath.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "drl_jax"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    # Starting a run is many small programs.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
