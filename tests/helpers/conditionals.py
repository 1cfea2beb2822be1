"""Two one-dimensional conditionals of T6, one normal and one bimodal, and chains on them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from drl_jax import diffusion, noise, recovery
from drl_jax.data import mixtures
from helpers.statistical import assert_mean

LEVEL, X_TILDE = 1, 0.1
DATA = {
    "normal": lambda: mixtures.gaussian(np.array([0.4]), np.array([[0.25]])),
    "bimodal": lambda: mixtures.isotropic(np.array([[-0.9], [0.9]]), 0.2, np.array([0.4, 0.6])),
}
GRID, STEP = np.linspace(-2.5, 2.5, 501, retstep=True)


def exact(name):
    """Returns the conditional as a mixture."""
    return mixtures.conditional(DATA[name](), jnp.array([[X_TILDE]]), LEVEL, schedule())


def schedule():
    return diffusion.schedule(6)


def log_density_fn(name, n):
    """Returns log p(y | x_tilde) with the exact energy, as a function of n positions."""
    F = mixtures.exact_F(DATA[name](), schedule())
    x_tilde, t = jnp.full((n, 1), X_TILDE), jnp.full(n, LEVEL)
    return lambda y: recovery.conditional_log_density(F, y, x_tilde, t, schedule())


def long_chain(name, init, kernel, n, steps, **tuning):
    """Returns the ends of n chains that start at x_tilde."""
    keys = noise.example_keys(jax.random.key(0), jnp.arange(n))
    tuning = {key: jnp.full(n, value) for key, value in tuning.items()}
    log_p = log_density_fn(name, n)

    def step(state, k):
        state, _ = kernel(noise.fold(keys, k), state, log_p, **tuning)
        return state, None

    @jax.jit
    def run():
        start = init(jnp.full((n, 1), X_TILDE), log_p)
        return jax.lax.scan(step, start, jnp.arange(steps))[0]

    return np.asarray(run().position)[:, 0]


def masses(density):
    """Returns the probabilities of the grid's cells; the tails beyond it are below 1e-9."""
    found = np.exp(np.float64(density.log_density(GRID[:, None]))) * STEP
    assert abs(found.sum() - 1) < 1e-5
    return found / found.sum()


def assert_moments(y, masses, powers=(1, 2, 3, 4)):
    """Asserts that samples y [n] have the moments of the probabilities of GRID's cells."""
    moment = functools.partial(_moment, masses)
    for power in powers:
        variance = moment(2 * power) - moment(power) ** 2
        assert_mean(np.float64(y) ** power, moment(power), variance, of=len(powers))


def _moment(masses, power):
    return masses @ GRID**power
