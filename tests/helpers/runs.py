"""Reads the work directories of runs, and waits for what they write."""

import time

import jax
import numpy as np

from drl_jax import method
from drl_jax.runtime import sharding
from drl_jax.storage import checkpoints
from drl_jax.training import state as train_state


def steps(workdir):
    """Returns the steps of all checkpoints, in ascending order."""
    names = (path.name for path in (workdir / "checkpoints").iterdir())
    return sorted(int(name) for name in names if name.isdecimal())


def abstract_state(config):
    """Returns the shapes of the training state of a configuration."""
    energy = method.from_config(config).energy
    return train_state.abstract(energy, train_state.optimiser(config))


def state_of(workdir, step=None):
    """Returns the training state of the newest checkpoint, or of a step.

    Deletes the checkpoints that are newer than this step.
    """
    if step is not None:
        for other in steps(workdir):
            if other > step:
                (workdir / "checkpoints" / str(other)).rmtree()
    replicated = sharding.replicated(sharding.make_mesh())
    with checkpoints.Checkpoints(workdir) as manager:
        _, state = manager.restore(abstract_state, lambda _: replicated)
    return jax.tree.map(np.asarray, state)


def assert_same(a, b):
    """Asserts that all arrays of two training states are bit-identical."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def wait_until(condition, process, timeout=120):
    """Waits until `condition()` is true, while a process runs."""
    end = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, "the process ended"
        assert time.monotonic() < end, f"nothing happened within {timeout} s"
        time.sleep(0.002)
