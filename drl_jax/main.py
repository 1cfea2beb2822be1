"""The command line: `python -m drl_jax.main --config=configs/digits.py --workdir=DIR`.

Short, so that everything it does can be imported and tested.
"""

import logging
import os
import sys
import time
from collections.abc import Sequence

from absl import flags
from etils import epath
from ml_collections import config_flags

from drl_jax import config as config_lib
from drl_jax.errors import Interrupted, UserError

FLAGS = flags.FLAGS
_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.")
_MODE = flags.DEFINE_enum("mode", "train", ["train", "sample", "evaluate"], "What to do.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where a run lives; a bucket will do.")
_NUM_SAMPLES = flags.DEFINE_integer("num_samples", 100, "Of --mode=sample.")
_SEED = flags.DEFINE_integer("seed", 0, "Of --mode=sample.")

log = logging.getLogger("drl_jax")


def main(argv: Sequence[str]) -> int:
    """Runs one mode and returns the exit status; a user's mistake is one line on stderr."""
    logging.basicConfig(format="%(message)s", level=logging.ERROR)
    log.setLevel(logging.INFO)
    try:
        parse(argv)
        run(_MODE.value)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Interrupted as interrupted:
        log.info("%s: the same command goes on from here", interrupted)
        return 128 + interrupted.signum
    return 0


def run(mode: str) -> None:
    """Runs one mode with the flags as parsed."""
    if mode == "train":
        if _CONFIG.value is None:
            raise UserError("--mode=train needs --config, such as --config=configs/digits.py")
        config_lib.validate(_CONFIG.value)
    elif _WORKDIR.value is None:
        raise UserError(f"--mode={mode} needs the --workdir of a trained model")
    prepare_jax()
    from drl_jax import modes  # JAX and Orbax load here, after the flags are known good

    if mode == "train":
        modes.train(_CONFIG.value, train_workdir())
    elif mode == "sample":
        modes.sample(epath.Path(_WORKDIR.value), _NUM_SAMPLES.value, _SEED.value)
    else:
        modes.evaluate(epath.Path(_WORKDIR.value))


def parse(argv: Sequence[str]) -> None:
    """Parses the command line, config file included.

    Raises:
      UserError: an unknown flag, mode, config file or config field, or a bad value.
    """
    try:
        rest = FLAGS(argv)
    except flags.Error as error:
        raise UserError(" ".join(str(error).split())) from error
    except FileNotFoundError as error:
        raise UserError(f"--config: no such file: {error.filename or error}") from error
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"--config: {' '.join(str(error).split())}") from error
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}: every option is --name=value")


def train_workdir() -> epath.Path:
    """Returns --workdir, or picks one under runs/ and says which; it can be written to.

    Raises:
      UserError: if it cannot be made or written.
    """
    if _WORKDIR.value:
        workdir = epath.Path(_WORKDIR.value)
    else:
        name = config_flags.get_config_filename(FLAGS["config"])
        name = os.path.splitext(os.path.basename(name))[0]
        workdir = epath.Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        log.info("no --workdir given: using %s", workdir)
    probe = workdir / f".probe-{os.getpid()}"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to --workdir={workdir}: {error.strerror}") from error
    return workdir


def prepare_jax() -> None:
    """Keeps compiled programs between runs, and TensorFlow (behind clu) quiet."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # else it announces itself
    cache = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(cache, "drl_jax"))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
