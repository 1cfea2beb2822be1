"""Target densities for kernels with an accept step (HMC, MALA), and assertions about both."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drl_jax import noise, recovery
from drl_jax.data import mixtures
from drl_jax.mcmc import hmc, langevin
from helpers.conditionals import assert_moments, exact, long_chain, masses, schedule
from helpers.statistical import assert_mean, assert_variance

MEAN, VARIANCE = np.array([1.5, -0.5]), np.array([0.4, 2.0])
GAUSSIAN = mixtures.gaussian(MEAN, np.diag(VARIANCE))


def gaussian(y):
    """Returns the log-density of N(MEAN, diag(VARIANCE)) at positions y [B, 2]."""
    return GAUSSIAN.log_density(y)


def planar_conditional(n):
    """Returns a planar conditional of T6, as a LogDensityFn of n positions and as a mixture."""
    data = mixtures.PLANAR_SHAPES["blobs"]()
    x_tilde, t = jnp.array([[0.2, -0.1]]), 2
    F = mixtures.exact_F(data, schedule())

    def log_density_fn(y):
        starts = jnp.broadcast_to(x_tilde, (n, 2))
        return recovery.conditional_log_density(F, y, starts, jnp.full(n, t), schedule())

    return log_density_fn, mixtures.conditional(data, x_tilde, t, schedule())


def run(log_density, start, kernel, steps, **tuning):
    """Runs one chain from every start; returns the last positions and the info of all steps."""
    n = len(start)
    keys = noise.example_keys(jax.random.key(0), jnp.arange(n))
    tuning = {name: jnp.full(n, value) for name, value in tuning.items()}

    def step(state, k):
        return kernel(noise.fold(keys, k), state, log_density, **tuning)

    run = jax.jit(lambda state: jax.lax.scan(step, state, jnp.arange(steps)))
    state, info = run(hmc.init(jnp.asarray(start), log_density))
    return np.asarray(state.position), info


def assert_gaussian_is_invariant(kernel, **tuning):
    """Asserts that chains that start from samples of a Gaussian keep this distribution.

    The step size is so large that many proposals are rejected.
    """
    n = 100_000
    start = GAUSSIAN.sample(noise.example_keys(jax.random.key(9), jnp.arange(n)))
    y, info = run(gaussian, start, kernel, 6, step_size=0.9, **tuning)
    assert 0.3 < np.mean(info.acceptance) < 0.95
    assert abs(np.mean(info.accepted) - np.mean(info.acceptance)) < 0.01
    assert_mean(y, MEAN, VARIANCE, of=2)
    assert_variance(y, MEAN, VARIANCE, of=2)


def assert_samples_conditional(kernel, name, **tuning):
    """Asserts that long chains from x_tilde have the first four moments of a conditional.

    Langevin dynamics with the same step size must fail the same test.
    """
    n, steps, s = 100_000, 150, 0.25
    p = masses(exact(name))
    y = long_chain(name, hmc.init, kernel, n, steps, step_size=s, **tuning)
    assert_moments(y, p)
    y = long_chain(name, langevin.init, langevin.kernel, n, steps, step_size=s)
    with pytest.raises(AssertionError, match="standard errors"):
        assert_moments(y, p)
