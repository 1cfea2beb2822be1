"""Run-time checks of all annotations, and fixtures that several test modules share."""

import gc
import signal

import helpers.typechecking

# Must come before the first import of the package.
helpers.typechecking.install()

import jax  # noqa: E402

from drl_jax.runtime import cpu_devices  # noqa: E402

# The number of devices does not depend on the machine, or on which test loads a model first.
if not cpu_devices.set_by_user():
    jax.config.update("jax_num_cpu_devices", 1)

# Python's own handlers, also where the tests run in the background or after nohup.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

from helpers.torch_files import torch  # noqa: E402, F401
from helpers.toy import trained_toy  # noqa: E402, F401


def pytest_collection_finish():
    """Makes garbage collection rare; by default it takes 9% of the time of the fast tests."""
    gc.freeze()  # imported modules are never garbage
    gc.set_threshold(100_000, 20, 50)
