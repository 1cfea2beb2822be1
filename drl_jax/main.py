"""Learns, samples and measures energy-based models by diffusion recovery likelihood.

python -m drl_jax.main --config=configs/digits.py --workdir=DIR
python -m drl_jax.main --mode=sample --workdir=DIR
python -m drl_jax.main --mode=inpaint --mask=centre --workdir=DIR
python -m drl_jax.main --mode=plan --config=configs/cifar10.py --topology=v5e:2x4
"""

import difflib
import functools
import importlib
import logging
import os
import re
import sys
import time
from collections.abc import Sequence

from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags
from tqdm.contrib.logging import logging_redirect_tqdm

from drl_jax import config as config_lib
from drl_jax import cores, processes
from drl_jax.errors import Interrupted, UserError
from drl_jax.plan import chips

# Each a module of `drl_jax.modes`.
MODES = (
    "train",
    "sample",
    "evaluate",
    "interpolate",
    "inpaint",
    "long_run",
    "likelihood",
    "ood",
    "export",
    "import_original",
    "plan",
)

# Flags that mean something to some modes only, which take them by these names.
ONLY_OF = {
    "config": ("train", "import_original", "plan"),
    "topology": ("plan",),
    "num_samples": ("sample",),
    "seed": ("sample", "interpolate", "inpaint", "long_run", "likelihood", "ood"),
    "model": ("likelihood", "ood"),
    "num_steps": ("long_run",),
    "num_chains": ("long_run",),
    "levels": ("long_run",),
    "images": ("interpolate", "inpaint"),
    "pairs": ("interpolate",),
    "frames": ("interpolate",),
    "level": ("interpolate",),
    "mask": ("inpaint",),
    "completions": ("inpaint",),
    "rounds": ("inpaint",),
    "against": ("ood",),
    "tf_checkpoint": ("import_original",),
    "image_size": ("import_original",),
}

# Fields that an import does not leave to choose.
IMPORTED = ("config.energy.", "config.data.channels", "config.data.image_size")

# Fields that mean something to a model that is trained already.
FREE_AFTER_TRAINING = (
    "config.mcmc.",
    "config.evaluation.",
    "config.likelihood.",
    "config.data.name",
    "config.data.split",
    "config.data.data_dir",
)

log = logging.getLogger("drl_jax")


def main(argv: Sequence[str]) -> int:
    """Runs one mode and returns the exit status; a user's mistake is one line on stderr."""
    logging.basicConfig(format="%(message)s", level=logging.ERROR)
    log.setLevel(logging.INFO)
    # Orbax tells every exception twice, the first time through absl and in many lines.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        if {"--help", "-help", "-h"}.intersection(argv):
            values = define_flags()
            print(__doc__, *(f"--{name:12} {values[name].help}" for name in values), sep="\n")
        else:
            values, changes = parse(argv)
            with logging_redirect_tqdm():  # so that no line tears a bar
                run(values, changes)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Interrupted as interrupted:
        log.info("%s: the same command goes on from here", interrupted)
        return 128 + interrupted.signum
    except KeyboardInterrupt:  # where there is nothing to save
        return 130
    return 0


def run(values: flags.FlagValues, changes: Sequence[str]) -> None:
    """Runs the mode that the flags name, in one process or as one of several."""
    job = processes.Job._make(values[name].value for name in processes.Job._fields)
    processes.require_possible(job)
    if values.mode == "plan":
        job = job._replace(distributed=False)  # wherever it is made
    if job.has_others and not values.workdir:
        raise UserError("one of several processes needs the --workdir that they share")
    config = None
    if values.config is not None:
        config = changed(config_lib.load(values.config), changes)
    elif values.mode == "import_original":
        config = changed(config_lib.default(), changes)
    prepare_jax(values.topology, 1 if job.has_others else cores.devices(config))
    with processes.joined(job):
        if job.has_others:
            agree(values, config, changes)
        run_mode(values, config, changes)


def agree(values: flags.FlagValues, config: ConfigDict | None, changes: Sequence[str]) -> None:
    """Sees that all processes are to do the same, and has only the first one speak.

    Raises:
      UserError: if they were started with different flags or configurations.
    """
    settings = values.flag_values_dict() | dict(config_lib.flatten(config or ConfigDict()))
    settings |= {"config": None if config else list(changes), "process_id": None}
    if not processes.require_same(settings):
        log.setLevel(logging.ERROR)


def run_mode(
    values: flags.FlagValues, config: ConfigDict | None, changes: Sequence[str]
) -> None:
    """Runs the mode, with the configuration if it is one that needs it."""
    # JAX and Orbax load with the mode, after the flags are known good.
    mode = importlib.import_module(f"drl_jax.modes.{values.mode}")
    options = {
        name: values[name].value
        for name, modes in ONLY_OF.items()
        if values.mode in modes and name != "config"
    }
    if config is None:
        options["revise"] = functools.partial(changed, changes=changes)
    else:
        options["config"] = config
    mode.run(workdir=pick_workdir(values), **options)


def define_flags() -> flags.FlagValues:
    """Returns this program's flags, unparsed.

    They are a set of their own, not absl's global one, so that `main` can be called again.
    """
    values = flags.FlagValues()
    flags.DEFINE_string(
        "config",
        None,
        "What to train, or all but the network of an import: a file of configs/; "
        "--config.FIELD=VALUE changes a field of it.",
        flag_values=values,
    )
    flags.DEFINE_enum("mode", "train", MODES, "What to do (train).", flag_values=values)
    flags.DEFINE_string(
        "workdir", None, "Where the run lives; a bucket will do.", flag_values=values
    )
    flags.DEFINE_integer(
        "num_samples", 100, "Of sample: how many (100).", lower_bound=1, flag_values=values
    )
    for name, default, at_least, text in (
        ("pairs", 8, 1, "Of interpolate: how many pairs of samples (8)."),
        ("frames", 9, 3, "Of interpolate: images of a strip, with its ends (9)."),
        ("level", None, None, "Of interpolate: the noise level that strips go through."),
        ("completions", 6, 2, "Of inpaint: completions of each image (6)."),
        ("rounds", 10, 1, "Of inpaint: how often each level is drawn (10)."),
        ("num_steps", 1000, 1, "Of long_run: steps of every chain (1000)."),
        ("num_chains", None, None, "Of long_run: chains a level (a batch of all)."),
    ):
        flags.DEFINE_integer(name, default, text, at_least, flag_values=values)
    flags.DEFINE_list(
        "images",
        [],
        "Of interpolate: FIRST,LAST,...; of inpaint: files, or else the run's own data.",
        flag_values=values,
    )
    flags.DEFINE_list(
        "levels", [], "Of long_run: such as 0,3,5 (all, or ten of many).", flag_values=values
    )
    flags.DEFINE_string(
        "mask",
        "centre",
        "Of inpaint, what is hidden: centre, left, right, top, bottom, checkerboard, "
        "random:0.5, or a PNG with that in white (centre).",
        flag_values=values,
    )
    flags.DEFINE_string(
        "model",
        None,
        "Of likelihood and ood: a work directory, an exported file, or a shipped name such as "
        "digits (the --workdir's own).",
        flag_values=values,
    )
    flags.DEFINE_list(
        "against",
        ["shuffled", "inverted", "uniform"],
        "Of ood: these three, or other images, as folder:PATH or a TFDS name (these three).",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "seed", 0, "Of all noise: equal seeds, equal pictures (0).", 0, 2**32 - 1, values
    )
    flags.DEFINE_boolean(
        "distributed",
        None,
        "Whether this is one of several processes (as Slurm or the TPU pod says).",
        flag_values=values,
    )
    flags.DEFINE_string(
        "coordinator_address",
        None,
        "Of several processes: HOST:PORT of the first (as the cluster says).",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "num_processes",
        None,
        "How many there are (as the cluster says).",
        1,
        flag_values=values,
    )
    flags.DEFINE_integer(
        "process_id",
        None,
        "Which this is, from 0 (as the cluster says).",
        0,
        flag_values=values,
    )
    flags.DEFINE_integer(
        "timeout",
        100,
        "Seconds for which the other processes may be silent (100).",
        10,
        flag_values=values,
    )
    flags.DEFINE_string(
        "topology",
        None,
        "Of plan: what to plan for, such as v5e:16x16 or h100:8; none of it need be here.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "tf_checkpoint",
        None,
        "Of import_original: the authors' TensorFlow checkpoint, as in DIR/ckpt-iter240000.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "image_size",
        None,
        "Of import_original: height and width of its images.",
        lower_bound=1,
        flag_values=values,
    )
    return values


def parse(argv: Sequence[str]) -> tuple[flags.FlagValues, Sequence[str]]:
    """Parses the command line; returns the --config.FIELD=VALUE apart, unparsed.

    Raises:
      UserError: an unknown flag or mode, a bad value, or flags that do not go together.
    """
    program, *args = argv
    changes = [arg for arg in args if re.match(r"--?(no)?config\.", arg)]
    values = define_flags()
    try:
        rest = values([program, *(arg for arg in args if arg not in changes)])
    except flags.Error as error:
        raise UserError(str(error)) from error
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}: every option is --name=value")
    for name, modes in ONLY_OF.items():
        if values[name].present and values.mode not in modes:
            raise UserError(
                f"--{name} is for --mode={' or '.join(modes)}, not for --mode={values.mode}"
            )
    if values.mode in ("train", "plan"):
        if values.config is None:
            raise UserError(
                f"--mode={values.mode} needs --config, such as --config=configs/digits.py"
            )
        if values.mode == "plan" and not values.topology:
            raise UserError("--mode=plan needs --topology, such as --topology=v5e:2x4")
        return values, changes
    if values.mode == "import_original":
        for name in ("tf_checkpoint", "image_size", "workdir"):
            if not values[name].value:
                raise UserError(f"--mode=import_original needs --{name}")
        for change in changes:
            if change.lstrip("-").startswith(IMPORTED):
                raise UserError(
                    f"{change} is for --mode=train: an import has it from the checkpoint and "
                    "--image_size"
                )
        return values, changes
    for text in values.levels:
        if not text.strip().isdecimal():
            raise UserError(f"--levels: {text!r} is no level, give numbers such as 0,3,5")
    free = () if values.mode == "export" else FREE_AFTER_TRAINING  # exported as it was made
    for change in changes:
        if not change.lstrip("-").startswith(free):
            raise UserError(f"{change} is for --mode=train, not for --mode={values.mode}")
    if values.mode == "interpolate":
        if len(values.images) % 2:
            raise UserError(f"--images names {len(values.images)} images: each two are a pair")
        if values.images and values["pairs"].present:
            raise UserError("--pairs is for strips between samples: leave it out with --images")
    if not values.workdir:
        what = "for its results" if values.model else "of a trained model"
        raise UserError(f"--mode={values.mode} needs the --workdir {what}")
    return values, changes


def changed(config: ConfigDict, changes: Sequence[str]) -> ConfigDict:
    """Returns the configuration with --config.FIELD=VALUE applied, and seen to be possible.

    Raises:
      UserError: an unknown field, or a value that it cannot have.
    """
    fields = [f"config.{name}" for name, _ in config_lib.flatten(config)]
    for change in changes:
        name = change.lstrip("-").removeprefix("no").partition("=")[0]
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"; did you mean --{near[0]}?" if near else ""
            raise UserError(f"{change}: the config has no such field{hint}")
    values = flags.FlagValues()
    args = ["", *changes]
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=args)
    try:
        values(args)
    except flags.Error as error:
        raise UserError(str(error)) from error
    config_lib.validate(values.config)
    return values.config


def pick_workdir(values: flags.FlagValues) -> epath.Path | None:
    """Returns --workdir, or picks one under runs/ and says which; a plan does without."""
    if values.workdir:
        return epath.Path(values.workdir).expanduser()
    if values.mode == "plan":
        return None
    name = epath.Path(values.config).stem
    workdir = epath.Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    log.info("no --workdir given: using %s", workdir)
    return workdir


def prepare_jax(topology: str | None = None, cpu_devices: int = 1) -> None:
    """Keeps compiled programs between runs, and TensorFlow (behind clu) quiet.

    A plan's topology has its compiler loaded instead, and compiles anew, to tell how long that
    takes. Where JAX runs on a processor, that is so many devices, unless XLA_FLAGS or
    JAX_NUM_CPU_DEVICES say otherwise.

    Raises:
      UserError: if there is no such topology.
    """
    if topology:
        os.environ.update(chips.parse(topology).environment)
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    elif not has_google_hardware():  # else libtpu, where it is installed, looks for a TPU aloud
        for name, value in chips.parse("v5e:1x1").environment.items():
            if name.startswith("TPU_"):
                os.environ.setdefault(name, value)
    if not cores.are_given():
        os.environ["JAX_NUM_CPU_DEVICES"] = str(cpu_devices)
    given = os.environ.get("XLA_FLAGS", "")
    if cores.PATIENCE not in given:
        os.environ["XLA_FLAGS"] = f"{cores.PATIENCE} {given}"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # errors alone
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # else it announces itself
    cache = epath.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "drl_jax"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    # Starting a run is many small programs.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def has_google_hardware() -> bool:
    """Whether a device on the PCI bus is Google's, as every TPU is."""
    vendors = epath.Path("/sys/bus/pci/devices").glob("*/vendor")
    return any(vendor.read_text().strip() == "0x1ae0" for vendor in vendors)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
