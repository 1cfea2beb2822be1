"""The smallest complete run, in this process or in a process of its own."""

import atexit
import fcntl
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import jax
from etils import epath

from drl_jax import main as main_lib
from drl_jax.runtime import cpu_devices

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "configs" / "digits_t6.py"


def _session_folder():
    """Returns a folder that the processes of a test session share; the first one deletes it."""
    if "DRL_JAX_TEST_SESSION" not in os.environ:
        folder = tempfile.mkdtemp(prefix="drl_jax_tests_")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ["DRL_JAX_TEST_SESSION"] = folder
    return Path(os.environ["DRL_JAX_TEST_SESSION"])


# A test session has its own compilation cache, so that results do not depend on earlier ones.
_SESSION = _session_folder()
COMPILED = _SESSION / "compiled"
jax.config.update("jax_compilation_cache_dir", str(COMPILED))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

# XLA flag without LLVM's optimisations. It makes tests of short programs faster, most of whose
# time is compilation.
COMPILE_FAST = "--xla_backend_optimization_level=0"

STEPS = 300
CONFIG = {
    "energy.ch": 8,
    "energy.mult": "(1,)",
    "mcmc.K": 2,
    "optim.decay_steps": 5000,  # the same for runs of any length
    "train.batch_size": 16,
    "train.num_steps": STEPS,
    "log.every_steps": 50,
    "log.sample_every_steps": 150,
    "checkpoint.every_steps": 20,
    "checkpoint.keep_every_steps": 100,
    "evaluation.batch_size": 64,
    "evaluation.num_samples": 100,
    "evaluation.num_data": 200,
}


def training(workdir, **changes):
    """Returns the arguments that train in a work directory.

    `changes` are fields of the configuration, with '__' in place of the dots.
    """
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    fields = (f"--config.{name}={value}" for name, value in (CONFIG | changes).items())
    return [f"--config={DIGITS}", f"--workdir={workdir}", *fields]


def main(*args):
    """Runs the program in this process and returns its exit status."""
    with mock.patch.dict(os.environ):
        return main_lib.main(["drl_jax", *map(str, args)])


def start(*args, **kwargs):
    """Starts the program in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "drl_jax.main", *map(str, args)],
        cwd=ROOT,
        env=environment(),
        **kwargs,
    )


def environment():
    """Returns this process's environment, with its compilation cache and number of devices."""
    variables = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(COMPILED)}
    if not cpu_devices.set_by_user():
        variables["JAX_NUM_CPU_DEVICES"] = str(jax.device_count())
    return variables


def trained_once(name, arguments):
    """Returns a work directory of this name, which one process of the session trains.

    `arguments(workdir)` returns the arguments of the program.
    """
    workdir = epath.Path(_SESSION / name)
    with (_SESSION / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process of the session may be training it
        if not (workdir / "metrics.json").exists():
            assert main(*arguments(workdir)) == 0
    return workdir


@functools.cache
def _trained():
    return trained_once("trained", training)


def trained(copy=None):
    """Returns the work directory of an uninterrupted run, or a copy that may be changed."""
    if copy is None:
        return _trained()
    shutil.copytree(_trained(), copy, dirs_exist_ok=True)
    return epath.Path(copy)
